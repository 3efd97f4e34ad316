"""Speculation changes no token and no log-probability, to the last bit: whatever is guessed, by whom, how
much of it is right, and whatever else happens beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.backends.cpu.formats import kv_page_bytes
from gossamer.config import (
    ContinuousBatching,
    EngineConfig,
    PagedAttention,
    PrefixCache,
    Quantization,
    SpeculativeDecoding,
)
from gossamer.engine.engine import Engine, Stats
from gossamer.engine.request import Request, SamplingParams
from gossamer.graph.families import build_graph
from gossamer.runtime.start import Started, start
from tests.exactness.models import CONFIG

Work = Sequence[tuple[tuple[int, ...], SamplingParams]]


@cache
def model(**changes: Any) -> str:
    """A directory with an architecture, for dummy weights."""
    directory = mkdtemp()
    Path(directory, "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return directory


def speculation(method: str, **changes: Any) -> SpeculativeDecoding | None:
    """draft_model: the model itself with coarser weights, which is often right; "stranger": one of another
    depth, which is not; "eagle": an untrained head, which hardly ever is."""
    if method == "ngram":
        return SpeculativeDecoding(method="ngram", prompt_lookup_min=1, **changes)
    if method == "eagle":
        return SpeculativeDecoding(method="eagle", **changes)
    if method == "stranger":
        return SpeculativeDecoding(method="draft_model", model=model(num_hidden_layers=1), **changes)
    return SpeculativeDecoding(
        method="draft_model", model=model(), quantization=Quantization.parse("int8"), **changes
    )


@cache
def started(  # tight: a pool for little more than one sequence of full length
    technique: SpeculativeDecoding | None, tight: bool, budget: int, kv_dtype: str
) -> Started:
    return start(
        EngineConfig(
            model=model(),
            load_format="dummy",
            max_model_len=256,
            max_num_seqs=4,
            max_num_batched_tokens=budget,
            kv_bytes=18 * kv_page_bytes(build_graph(CONFIG), 16, kv_dtype) if tight else None,
            kv_dtype=kv_dtype,  # type: ignore[arg-type]
            paged_attention=PagedAttention(page_size=16),
            speculative_decoding=technique,
        )
    )


def run(
    work: Work,
    technique: SpeculativeDecoding | None = None,
    *,
    tight: bool = False,
    budget: int = 64,
    kv_dtype: str = "bf16",
    batching: ContinuousBatching | None = None,
    prefix_cache: PrefixCache | None = None,
) -> tuple[list[list[object]], Stats]:
    """Every request's (token, logprob, top) and the counters at the end, all requests submitted together."""
    ready = started(technique, tight, budget, kv_dtype)
    engine = Engine(
        ready.executor,
        batching=batching or ContinuousBatching(),
        max_num_seqs=4,
        prefix_cache=prefix_cache,
        speculation=technique,
    )
    out: list[list[object]] = [[] for _ in work]
    for i, (prompt, params) in enumerate(work):
        engine.submit(Request(id=str(i), prompt_ids=prompt, params=params, eos_ids=(299,)))
    while engine.has_work():
        for update in engine.step():
            assert update.finish_reason in (None, "length", "stop")
            assert update.logprobs is not None and len(update.logprobs) == len(update.tokens)
            out[int(update.request_id)] += [(p.token, p.logprob, p.top) for p in update.logprobs]
            if update.finish_reason:
                out[int(update.request_id)].append(update.finish_reason)
        engine.check()
    assert engine.kv_usage == 0 or prefix_cache is not None
    return out, engine.stats()


# A few tokens over and over, so that there is something to quote.
prompts = st.builds(
    lambda part, length: tuple((part * length)[:length]),
    st.lists(st.integers(0, 9), min_size=1, max_size=12),
    st.integers(1, 90),
)


@st.composite
def params(draw: st.DrawFn) -> SamplingParams:
    most = draw(st.integers(1, 60))
    return SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.3, 1.0])),
        top_k=draw(st.sampled_from([0, 3])),
        top_p=draw(st.sampled_from([1.0, 0.8])),
        min_p=draw(st.sampled_from([0.0, 0.05])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.2])),
        presence_penalty=draw(st.sampled_from([0.0, 0.3])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.4])),
        logit_bias=draw(st.dictionaries(st.integers(0, 299), st.floats(-5, 5), max_size=3)),
        seed=draw(st.integers(0, 2**32)),
        max_tokens=most,
        min_tokens=draw(st.integers(0, most)),
        stop_token_ids=tuple(draw(st.lists(st.integers(0, 299), max_size=3))),
        logprobs=2,
    )


@settings(max_examples=40, deadline=None)
@given(
    work=st.lists(st.tuples(prompts, params()), min_size=1, max_size=6),
    method=st.sampled_from(["ngram", "draft_model", "stranger", "eagle"]),
    most=st.sampled_from([1, 4, 7]),
    width=st.integers(1, 4),
    adaptive=st.booleans(),
    chunk=st.sampled_from([None, 7]),
    budget=st.sampled_from([16, 64]),
    tight=st.booleans(),
    kv_dtype=st.sampled_from(["bf16", "int4"]),
    cached=st.booleans(),
)
def test_speculation_changes_nothing(
    work: Work,
    method: str,
    most: int,
    width: int,
    adaptive: bool,
    chunk: int | None,
    budget: int,
    tight: bool,
    kv_dtype: str,
    cached: bool,
) -> None:
    technique = speculation(method, num_speculative_tokens=most, tree_width=width, adaptive=adaptive)
    together, _ = run(
        work,
        technique,
        tight=tight,
        budget=budget,
        kv_dtype=kv_dtype,
        batching=ContinuousBatching(prefill_chunk=chunk),
        prefix_cache=PrefixCache() if cached else None,
    )
    for each, got in zip(work, together):
        assert got == run([each], kv_dtype=kv_dtype)[0][0]


@pytest.mark.parametrize("method", ["ngram", "draft_model"])
@pytest.mark.parametrize("temperature", [0.0, 0.3])
def test_guesses_are_right_and_save_steps(method: str, temperature: float) -> None:
    work = []
    for i in range(4):
        sampled = SamplingParams(temperature=temperature, seed=i, max_tokens=60, logprobs=2)
        work.append((tuple(range(i, i + 20)) * 3, sampled))
    plain, before = run(work)
    got, after = run(work, speculation(method, adaptive=False))
    assert got == plain
    assert after.accepted > 20 and after.steps < before.steps


def test_preempted_sequences_speculate_on() -> None:
    work = [
        ((1, 2, 3, 4) * 5, SamplingParams(temperature=0.0, max_tokens=120, logprobs=2, logit_bias={i: 1.0}))
        for i in range(4)
    ]
    for method in ("ngram", "draft_model"):
        got, stats = run(work, speculation(method, adaptive=False), tight=True)
        assert stats.preemptions > 0 and stats.accepted > 0
        assert got == [run([each])[0][0] for each in work]


@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_branches_of_real_proposers_are_taken(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []
    compact = Engine._compact

    def watched(self: Engine, seq: Any, start: int, path: list[int]) -> None:
        moved.append(path != list(range(len(path))))
        compact(self, seq, start, path)

    monkeypatch.setattr(Engine, "_compact", watched)
    # A few tokens in any order for prompt lookup: what followed before is one of several. Else the best one.
    few = {"temperature": 1.0, "logit_bias": dict.fromkeys(range(4), 30.0)} if method == "ngram" else {}
    sampled = {"temperature": 0.0, "max_tokens": 60, "logprobs": 2, **few}
    work: Work = [((i, 2, 3), SamplingParams(seed=i, **sampled)) for i in range(8)]  # type: ignore[arg-type]
    got, stats = run(work, speculation(method, tree_width=4, num_speculative_tokens=3, adaptive=False))
    assert got == [run([each])[0][0] for each in work]
    assert any(moved) and stats.accepted > 20
