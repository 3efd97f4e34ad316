"""Several rows of one span: each becomes the token that a step of its own would have given it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.config import EngineConfig
from gossamer.engine.request import SamplingParams
from gossamer.engine.step import Executor, LastSampled, RowResult, Sampling, Span, StepPlan
from gossamer.errors import GraphError
from gossamer.runtime.local import LocalExecutor
from gossamer.runtime.reference import ReferenceExecutor
from gossamer.runtime.rows import produced_before
from gossamer.runtime.start import start
from tests.graph.small import llama_config

VOCAB = 40
PROMPT = (3, 9, 27, 9, 1, 3)
END = (7, 8)


def make(directory: Path, backend: Any) -> Executor:
    (directory / "config.json").write_text(json.dumps(llama_config(vocab_size=VOCAB)))
    config = EngineConfig(
        model=str(directory), load_format="dummy", max_model_len=64, max_num_seqs=16, backend=backend
    )
    return start(config).executor


@pytest.fixture(scope="module", params=["cpu", "reference"])
def executor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Executor:
    return make(tmp_path_factory.mktemp(request.param), request.param)


def run(executor: Executor, span: Span) -> list[RowResult]:
    return executor.collect(executor.submit(StepPlan((span,)))).rows[0]


def tables(executor: Executor) -> tuple[list[int], ...]:
    return tuple([0, 1, 2, 3] for _ in executor.limits.pages)


def mask(allowed: set[int]) -> bytes:
    return np.packbits([t in allowed for t in range(64)], bitorder="little").tobytes()


tokens = st.integers(0, VOCAB - 1)
treatments = st.fixed_dictionaries(
    {"seed": st.just(1)},
    optional={
        "temperature": st.sampled_from([0.0, 0.7]),
        "top_k": st.sampled_from([0, 5]),
        "top_p": st.sampled_from([1.0, 0.8]),
        "repetition_penalty": st.sampled_from([1.0, 1.8]),
        "presence_penalty": st.sampled_from([0.0, 1.5]),
        "frequency_penalty": st.sampled_from([0.0, 1.5]),
        "logit_bias": st.dictionaries(tokens, st.sampled_from([-4.0, 4.0]), max_size=3),
        "min_tokens": st.integers(0, 8),
        "logprobs": st.sampled_from([None, 0, 3]),
    },
)


drafts = st.fixed_dictionaries(
    {
        "treatment": treatments,
        "output": st.lists(tokens, min_size=1, max_size=4),
        "draft": st.lists(tokens, max_size=6),
        "parents": st.none() | st.lists(st.integers(0, 1 << 20), min_size=6, max_size=6),
        "masked": st.sets(st.integers(0, 6)),
        "seed": st.integers(0, 2**64 - 1),
    }
)


def test_rows_of_a_draft_are_those_of_single_steps(executor: Executor) -> None:
    local = isinstance(executor, LocalExecutor)

    @settings(max_examples=80 if local else 12, deadline=None)
    @given(drafts)
    def check(case: dict[str, Any]) -> None:
        for found, alone in both_ways(executor, **case):
            if local:
                assert found == alone
            else:  # torch may add in another order
                assert (found.token, found.bad) == (alone.token, alone.bad)

    check()


def both_ways(
    executor: Executor,
    *,
    treatment: dict[str, Any],
    output: list[int],
    draft: list[int],
    parents: list[int] | None,
    masked: set[int],
    seed: int,
) -> Iterator[tuple[RowResult, RowResult]]:
    """Each row of one span, and of a span with its own path whose last token alone is sampled."""
    params, pages = SamplingParams(max_tokens=None, **treatment), tables(executor)
    count, begin = 1 + len(draft), len(PROMPT) + len(output) - 1
    above = [-1, *(i if parents is None else parents[i] % (i + 1) for i in range(count - 1))]
    allowed = [mask({7, 8, *range(i, 30, 3)}) if i in masked else None for i in range(count)]
    run(executor, Span(0, (*PROMPT, *output[:-1]), 0, (), pages))
    ids = (output[-1], *draft)
    sampling = Sampling(params, seed, PROMPT, output, END, allowed)
    tree = None if parents is None else tuple(above)
    together = run(executor, Span(0, ids, begin, tuple(range(count)), pages, sampling, parents=tree))
    for row in range(count):
        path, at = [], row
        while at >= 0:
            path.insert(0, ids[at])
            at = above[at]
        own = Sampling(params, seed, PROMPT, [*output, *path[1:]], END, [allowed[row]])
        (alone,) = run(executor, Span(0, path, begin, (len(path) - 1,), pages, own))
        yield together[row], alone


def test_targets_have_the_log_probability_of_their_logits(executor: Executor) -> None:
    """A prompt's next tokens, the last row's sampled: its index is that of the first token."""
    pages = tables(executor)
    params = SamplingParams(temperature=0.9, prompt_logprobs=2, logprobs=VOCAB // 2, seed=5)
    sampling = Sampling(params, 5, PROMPT, [])
    rows = tuple(range(len(PROMPT)))
    found = run(executor, Span(0, PROMPT, 0, rows, pages, sampling, targets=(*PROMPT[1:], -1)))
    every = SamplingParams(temperature=0, logprobs=20)
    for i, (row, target) in enumerate(zip(found, PROMPT[1:])):
        (alone,) = run(executor, Span(1, PROMPT[: i + 1], 0, (i,), pages, Sampling(every, 5, PROMPT, [])))
        assert row.logprob is not None and alone.logprob is not None
        assert row.token == row.logprob.token == target
        assert [t for t, _ in row.logprob.top] == [t for t, _ in alone.logprob.top[:2]]
        assert row.logprob.top[0][1] == pytest.approx(alone.logprob.top[0][1], abs=1e-5)
        known = dict(alone.logprob.top)
        if target in known:
            assert row.logprob.logprob == pytest.approx(known[target], abs=1e-5)
        else:
            assert row.logprob.logprob <= alone.logprob.top[-1][1] + 1e-5
    (plain,) = run(executor, Span(1, PROMPT, 0, (len(PROMPT) - 1,), pages, sampling))
    assert found[-1].token == plain.token


def test_logits_are_those_that_a_step_samples_from(executor: Executor) -> None:
    """Of two sequences in one step, the second in two pieces."""
    assert isinstance(executor, LocalExecutor | ReferenceExecutor)
    first, second = ([0, 1], [2, 3])
    pages = [tuple(p for _ in executor.limits.pages) for p in (first, second)]
    early = Span(1, PROMPT[:4], 0, (), pages[1])
    late = Span(1, PROMPT[4:], 4, (0, 1), pages[1])
    whole = Span(0, PROMPT, 0, (4, 5), pages[0])
    assert executor.logits(StepPlan((early,))).shape == (0, VOCAB)
    logits = executor.logits(StepPlan((whole, late))).astype(np.float64)
    np.testing.assert_allclose(logits[:2], logits[2:], atol=1e-5)
    params = SamplingParams(temperature=0, logprobs=20)
    for row, length in zip(logits, (5, 6)):
        span = Span(2, PROMPT[:length], 0, (length - 1,), pages[0], Sampling(params, 0, PROMPT, []))
        (found,) = run(executor, span)
        assert found.logprob is not None
        for token, logprob in found.logprob.top:
            assert row[token] - np.log(np.exp(row).sum()) == pytest.approx(logprob, abs=1e-5)


def test_a_mask_leaves_what_it_allows(executor: Executor) -> None:
    pages, greedy = tables(executor), SamplingParams(temperature=0)
    for allowed, bad in (({4, 33}, ""), ({39}, ""), (set(), "empty")):
        sampling = Sampling(greedy, 0, PROMPT, [], masks=[mask(allowed)])
        (row,) = run(executor, Span(0, PROMPT, 0, (len(PROMPT) - 1,), pages, sampling))
        assert row.bad == bad
        assert bad or row.token in allowed


@pytest.mark.parametrize("least", [0, 2])
@pytest.mark.parametrize("seed", range(6))
def test_a_token_that_is_pending_counts_for_the_output_index(
    executor: Executor, seed: int, least: int
) -> None:
    """Noise and min_tokens go by it."""
    params = SamplingParams(temperature=1.5, min_tokens=least, max_tokens=9)
    sampling = Sampling(params, seed, PROMPT, [], tuple(range(30)))
    first = Span(0, PROMPT, 0, (len(PROMPT) - 1,), tables(executor), sampling)
    (row,) = run(executor, first)
    named = Span(0, (LastSampled(0),), len(PROMPT), (0,), tables(executor), replace(sampling, pending=1))
    (found,) = run(executor, named)
    known = replace(named, tokens=(row.token,), sampling=replace(sampling, output_ids=[row.token]))
    assert run(executor, known) == [found]


def test_penalties_for_a_token_that_is_pending_are_stopped(tmp_path: Path) -> None:
    executor = make(tmp_path, "cpu")
    sampling = Sampling(SamplingParams(presence_penalty=1.0), 0, (1,), [])
    run(executor, Span(0, (1,), 0, (0,), tables(executor), sampling))
    late = Span(0, (LastSampled(0),), 1, (0,), tables(executor), replace(sampling, pending=1))
    with pytest.raises(GraphError, match="not known yet"):
        executor.submit(StepPlan((late,)))


def test_masks_and_targets_of_another_vocabulary_are_stopped(tmp_path: Path) -> None:
    executor = make(tmp_path, "cpu")
    span = Span(0, (1,), 0, (0,), tables(executor), Sampling(SamplingParams(), 0, (1,), [], masks=[b"1234"]))
    with pytest.raises(GraphError, match="mask of 4 bytes"):
        executor.submit(StepPlan((span,)))
    with pytest.raises(GraphError, match="target 40"):
        executor.submit(StepPlan((replace(span, targets=(VOCAB,)),)))


def test_what_was_produced_before_a_row() -> None:
    chain = Span(0, (10, 11, 12, 13), 5, (1, 2, 3), ())
    assert [*map(list, produced_before(chain, chain.tokens))] == [[], [12], [12, 13]]  # type: ignore[arg-type]
    prompt = replace(chain, targets=(11, 12, -1))
    assert [*map(list, produced_before(prompt, prompt.tokens))] == [[], [], []]  # type: ignore[arg-type]
    tree = Span(0, (10, 11, 12, 13), 5, (0, 1, 2, 3), (), parents=(-1, 0, 0, 2))
    assert [*map(list, produced_before(tree, tree.tokens))] == [[], [11], [12], [12, 13]]  # type: ignore[arg-type]
