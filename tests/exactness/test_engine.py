"""The engine with everything on, over real kernels, gives each request the bits that it gets alone.

Random requests, arrivals, aborts, page and chunk sizes, preemption by recomputation and by swap, prefixes
found, outputs that share a prompt, drafts right and wrong as chains and trees, grammars, penalties; steps in
turn, and planned while the one before is in flight.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gossamer.config import (
    ContinuousBatching,
    EngineConfig,
    PagedAttention,
    ParallelComputing,
    PrefixCache,
    Quantization,
)
from gossamer.engine.engine import Engine
from gossamer.engine.step import Executor
from gossamer.runtime.null import Delayed
from gossamer.runtime.start import start
from tests.engine.serving import VOCAB, Client, Got
from tests.engine.test_exactness import Arrival, arrivals, make_bare, run_plan

CONTEXT = 128
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "max_position_embeddings": CONTEXT,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
WINDOWS = {"sliding_window": 40, "use_sliding_window": True, "max_window_layers": 1}


@cache
def model(windows: bool) -> str:
    """A directory with a small architecture, of two KV groups with windows, for dummy weights."""
    directory = mkdtemp()
    Path(directory, "config.json").write_text(json.dumps(CONFIG | (WINDOWS if windows else {})))
    return directory


@cache
def executor(windows: bool, kv_dtype: str, pages: int, page_size: int, swaps: bool) -> Executor:
    """Of a pool of so many pages; it serves many engines, one after the other."""
    config = EngineConfig(
        model=model(windows),
        load_format="dummy",
        weight_cache=False,
        quantization=Quantization(format="int8"),
        kv_dtype=kv_dtype,  # type: ignore[arg-type]
        paged_attention=PagedAttention(page_size=page_size, swap_bytes=1 << 20 if swaps else None),
        parallel_computing=ParallelComputing(threads=1),
        max_model_len=CONTEXT,
        max_num_seqs=32,
        max_num_batched_tokens=40,
    )
    made = start(config).executor
    object.__setattr__(made.limits, "pages", (pages,) * len(made.limits.pages))
    return made


@pytest.mark.parametrize("overlaps", [False, True], ids=["in turn", "overlapping"])
@pytest.mark.parametrize("windows", [False, True])
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    arrivals(),
    st.sampled_from(["f32", "bf16", "int8", "int4"]),
    st.sampled_from([(8, 16), (12, 16), (6, 32), (40, 16)]),
    st.none() | st.integers(1, 20),
    st.sampled_from(["auto", "recompute", "swap"]),
    st.integers(1, 8),
    st.none() | st.integers(0, 99),
    st.booleans(),
)
def test_everything_on_changes_no_bit(
    windows: bool,
    overlaps: bool,
    plan: list[Arrival],
    kv_dtype: str,
    pages: tuple[int, int],
    chunk: int | None,
    preempt_by: str,
    max_num_seqs: int,
    guesses: int | None,
    cached: bool,
) -> None:
    alone = executor(windows, kv_dtype, 40, 16, False)
    expected: dict[tuple[str, int], Got] = {}
    for a in plan:
        expected.update(Client(make_bare(alone)).run(a.request))
    serving = executor(windows, kv_dtype, *pages, preempt_by != "recompute")
    engine = Engine(
        Delayed(serving) if overlaps else serving,
        batching=ContinuousBatching(prefill_chunk=chunk, preempt_by=preempt_by),  # type: ignore[arg-type]
        max_num_seqs=max_num_seqs,
        prefix_cache=PrefixCache() if cached else None,
    )
    run_plan(engine, plan, expected, guesses)
