"""A request's tokens and log-probabilities do not depend on what runs beside it, nor on how it is cut.

On the CPU backend this is exact to the last bit: greedy and seeded, in every format of weights and KV, in
any batch, with any prefill chunk, page size and thread count, and after preemption.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.config import (
    ContinuousBatching,
    EngineConfig,
    LayerFusion,
    MixedPrecision,
    PagedAttention,
    ParallelComputing,
    PrefixCache,
    Quantization,
    StaticBatching,
)
from gossamer.engine.engine import Engine
from gossamer.engine.request import Request, SamplingParams
from gossamer.runtime.start import start
from tests.exactness.models import CONFIG

FORMATS = ("f32", "bf16", "f16", "int8", "int8-g16", "int4", "uint4", "nf4")


@cache
def model() -> str:
    """A directory with a small architecture of two KV groups, for dummy weights."""
    directory = mkdtemp()
    Path(directory, "config.json").write_text(json.dumps(CONFIG))
    return directory


def run(
    requests: list[tuple[tuple[int, ...], SamplingParams]], format: str, **options: object
) -> list[list[object]]:
    """Every request's (token, logprob) pairs, all requests submitted together."""
    weights: dict[str, object] = {}
    if format in ("bf16", "f16"):
        weights["mixed_precision"] = MixedPrecision(dtype=format)  # type: ignore[arg-type]
    elif format != "f32":
        weights["quantization"] = Quantization.parse(format)
    config = EngineConfig(
        model=model(),
        load_format="dummy",
        max_model_len=256,
        **weights,
        **options,  # type: ignore[arg-type]
    )
    started = start(config)
    batching = config.continuous_batching or config.static_batching
    assert batching is not None
    engine = Engine(started.executor, batching=batching, max_num_seqs=config.max_num_seqs)
    out: list[list[object]] = [[] for _ in requests]
    for i, (prompt, params) in enumerate(requests):
        engine.submit(Request(id=str(i), prompt_ids=prompt, params=params))
    while engine.has_work():
        for update in engine.step():
            assert update.finish_reason in (None, "length", "stop")
            assert update.logprobs is not None
            out[int(update.request_id)] += [(p.token, p.logprob, p.top) for p in update.logprobs]
        engine.check()
    run.preemptions = engine.stats().preemptions  # type: ignore[attr-defined]
    return out


prompts = st.lists(st.integers(0, 299), min_size=1, max_size=90).map(tuple)
params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 1.3]),
    top_k=st.sampled_from([0, 5]),
    top_p=st.sampled_from([1.0, 0.8]),
    min_p=st.sampled_from([0.0, 0.05]),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    frequency_penalty=st.sampled_from([0.0, 0.4]),
    seed=st.integers(0, 2**32),
    max_tokens=st.integers(1, 40),
    logprobs=st.just(2),
)


@settings(max_examples=25, deadline=None)
@given(
    requests=st.lists(st.tuples(prompts, params), min_size=1, max_size=6),
    format=st.sampled_from(FORMATS),
    chunk=st.sampled_from([None, 1, 7, 33]),
    budget=st.sampled_from([6, 40, 512]),
    page_size=st.sampled_from([16, 48]),
    threads=st.sampled_from([1, 2]),
    pool=st.sampled_from([None, 10]),
    kv_dtype=st.sampled_from(["bf16", "f32", "int8", "int4"]),
)
def test_alone_and_together(
    requests: list[tuple[tuple[int, ...], SamplingParams]],
    format: str,
    chunk: int | None,
    budget: int,
    page_size: int,
    threads: int,
    pool: int | None,
    kv_dtype: str,
) -> None:
    alone = [run([r], format, max_num_seqs=1, kv_dtype=kv_dtype)[0] for r in requests]
    options: dict[str, object] = {}
    if pool is not None:  # a pool for little more than one sequence, so that running ones are preempted
        from gossamer.backends.cpu.formats import kv_page_bytes
        from gossamer.graph.families import build_graph

        per_page = kv_page_bytes(build_graph(CONFIG), page_size, kv_dtype)
        options["kv_bytes"] = (-(-256 // page_size) + 1) * per_page
    together = run(
        requests,
        format,
        max_num_seqs=6,
        max_num_batched_tokens=budget,
        kv_dtype=kv_dtype,
        continuous_batching=ContinuousBatching(prefill_chunk=chunk),
        paged_attention=PagedAttention(page_size=page_size),
        parallel_computing=ParallelComputing(threads=threads),
        **options,
    )
    assert together == alone


@pytest.mark.parametrize("format", FORMATS)
def test_after_preemption(format: str) -> None:
    """Long outputs crowd a pool for little more than one of them: sequences are preempted and recomputed."""
    from gossamer.backends.cpu.formats import kv_page_bytes
    from gossamer.graph.families import build_graph

    requests = [
        (tuple(range(i, i + 20)), SamplingParams(temperature=t, seed=i, max_tokens=150, logprobs=1))
        for i, t in enumerate((0.0, 0.9, 1.1, 0.5))
    ]
    alone = [run([r], format, max_num_seqs=1)[0] for r in requests]
    kv_bytes = 18 * kv_page_bytes(build_graph(CONFIG), 16, "bf16")
    assert run(requests, format, max_num_seqs=4, kv_bytes=kv_bytes) == alone
    assert run.preemptions > 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("paged", [False, True])
def test_static_batching_gives_the_same_tokens(padded: bool, paged: bool) -> None:
    requests = [
        (
            tuple(range(i, 3 * i + 5)),
            SamplingParams(temperature=0.8, seed=i, max_tokens=5 + 7 * i, logprobs=1),
        )
        for i in range(6)
    ]
    alone = [run([r], "int4", max_num_seqs=1)[0] for r in requests]
    batched = run(
        requests,
        "int4",
        max_num_seqs=4,
        continuous_batching=None,
        static_batching=StaticBatching(padded=padded),
        paged_attention=PagedAttention() if paged else None,
        prefix_cache=PrefixCache() if paged else None,
    )
    assert batched == alone


def test_instruction_sets_agree_on_tokens() -> None:
    """Not bit for bit (sums run in another order), but within rounding: the same likely tokens."""
    from gossamer import _native
    from gossamer.config import HardwareKernels

    request = (tuple(range(40)), SamplingParams(temperature=0, max_tokens=8, logprobs=3))
    results = [
        run([request], "f32", max_num_seqs=1, hardware_kernels=HardwareKernels(isa=isa))[0]
        for isa in _native.isas()
    ]
    for other in results[1:]:
        for (token, logprob, _), (token2, logprob2, _) in zip(results[0], other, strict=True):  # type: ignore[misc]
            assert token == token2
            assert abs(logprob - logprob2) < 1e-4


@pytest.mark.parametrize("off", ["flash_attention", "dynamic_shapes", "both"])
@pytest.mark.parametrize("layer_fusion", [LayerFusion(rows=16), None])
@pytest.mark.parametrize("kv_dtype", ["bf16", "int4"])
def test_baselines_of_attention_and_shapes(off: str, layer_fusion: LayerFusion | None, kv_dtype: str) -> None:
    """In company, with scores in memory and steps padded: the bits of being alone without either, for keys
    here are of one split. int8 activations and scores share the workspace."""
    requests = [
        (
            tuple(range(i, 40 * i + 5)),
            SamplingParams(temperature=0.8 * (i % 2), seed=i, max_tokens=9, logprobs=1),
        )
        for i in range(5)
    ]
    alone = [run([r], "int8", max_num_seqs=1, kv_dtype=kv_dtype)[0] for r in requests]
    together = run(
        requests,
        "int8",
        max_num_seqs=4,
        max_num_batched_tokens=50,
        kv_dtype=kv_dtype,
        layer_fusion=layer_fusion,
        operator_fusion=None,
        **dict.fromkeys(("flash_attention", "dynamic_shapes") if off == "both" else (off,), None),
    )
    assert together == alone
