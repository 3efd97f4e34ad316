"""Whatever happens around a request, it gets the tokens that it gets alone."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, target
from hypothesis import strategies as st

from gossamer.config import ContinuousBatching, PrefixCache, StaticBatching
from gossamer.engine.batching import Batching
from gossamer.engine.engine import Engine, Stats
from gossamer.engine.request import Request
from gossamer.engine.speculative_decoding.draft import Draft
from gossamer.engine.speculative_decoding.speculator import Speculator
from gossamer.engine.step import Executor, ExecutorLimits
from gossamer.errors import ContextLengthError, MemoryBudgetError
from gossamer.runtime.null import NullExecutor
from tests.engine.serving import VOCAB, Client, Got, executor, limits, request

pytestmark = pytest.mark.usefixtures("overlaps")
every = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@dataclass(frozen=True)
class Arrival:
    step: int
    request: Request
    abort_after: int | None


@st.composite
def limits_of(draw: st.DrawFn) -> ExecutorLimits:
    context = draw(st.integers(8, 100))
    contiguous = draw(st.booleans())
    size = -(-context // 16) * 16 if contiguous else draw(st.sampled_from([16, 32]))
    groups = draw(st.integers(1, 2))
    return limits(
        max_tokens=draw(st.integers(1, 40)),
        page_size=size,
        pages=tuple(draw(st.lists(st.integers(1, 3 if contiguous else 8), min_size=groups, max_size=groups))),
        max_model_len=context,
        windows=tuple(draw(st.lists(st.none() | st.integers(2, 40), min_size=groups, max_size=groups))),
        swap_pages=() if draw(st.booleans()) else (draw(st.integers(0, 6)),) * groups,
    )


class Steps:
    """A grammar whose outputs go up by 1 to 3 (modulo the vocabulary) and may end at multiples of 5."""

    def __init__(self, ends: tuple[int, ...]) -> None:
        self._ends, self._last, self.ended, self.error = ends, 0, False, ""

    def _allows(self, last: int, token: int) -> bool:
        return (token - last) % VOCAB in (1, 2, 3) or (token in self._ends and last % 5 == 0)

    def _parent(self, draft: Draft, i: int) -> int:
        return i - 1 if draft.parents is None else draft.parents[i]

    def prune(self, draft: Draft) -> Draft | None:
        kept: dict[int, int] = {-1: -1}
        tokens: list[int] = []
        for i, token in enumerate(draft.tokens):
            parent = self._parent(draft, i)
            last = self._last if parent < 0 else draft.tokens[parent]
            if parent in kept and self._allows(last, token) and token not in self._ends:
                kept[i] = len(tokens)
                tokens.append(token)
        parents = [kept[self._parent(draft, i)] for i in kept if i >= 0]
        return Draft(tokens, parents) if tokens else None

    def masks(self, draft: Draft | None) -> list[bytes | None]:
        lasts = [self._last, *(draft.tokens if draft is not None else ())]
        return [
            sum(1 << t for t in range(VOCAB) if self._allows(last, t)).to_bytes(8, "little") for last in lasts
        ]

    def accept(self, token: int) -> None:
        assert self._allows(self._last, token)
        self._last = token


PREFIX = [7, 8, 9] * 20


@st.composite
def arrivals(draw: st.DrawFn) -> list[Arrival]:
    result = []
    for i in range(draw(st.integers(1, 10))):
        most = draw(st.none() | st.integers(1, 50))
        eos = tuple(draw(st.lists(st.integers(0, 49), max_size=2)))
        shared = draw(st.integers(0, 50))
        result.append(
            Arrival(
                step=draw(st.integers(0, 30)),
                request=request(
                    f"r{i}",
                    PREFIX[:shared] + draw(st.lists(st.integers(0, 49), min_size=1, max_size=60 - shared)),
                    priority=draw(st.integers(0, 2)),
                    eos=eos,
                    tenant=draw(st.sampled_from("ab")),
                    cache_salt=draw(st.sampled_from(["", "salt"])),
                    grammar=draw(st.none() | st.just(partial(Steps, eos))),
                    n=draw(st.integers(1, 3)),
                    temperature=draw(st.sampled_from([0.0, 1.0])),
                    top_k=draw(st.sampled_from([0, 5])),
                    top_p=draw(st.sampled_from([1.0, 0.8])),
                    repetition_penalty=draw(st.sampled_from([1.0, 1.3])),
                    presence_penalty=draw(st.sampled_from([0.0, 0.5])),
                    logit_bias=draw(st.sampled_from([{}, {3: 4.0, 7: -2.0}])),
                    seed=draw(st.integers(0, 2**64 - 1)),
                    max_tokens=most,
                    min_tokens=draw(st.integers(0, most or 50)),
                    stop_token_ids=tuple(draw(st.lists(st.integers(0, 49), max_size=2))),
                    logprobs=draw(st.none() | st.integers(0, 3)),
                    prompt_logprobs=draw(st.none() | st.integers(0, 2)),
                ),
                abort_after=draw(st.none() | st.integers(0, 20)),
            )
        )
    return result


class Guess(Speculator):
    """Chains and trees of guesses, right as often as chance has it; the model is asked what it would say."""

    def __init__(self, engine: Engine, alone: Mapping[tuple[str, int], Got], seed: int) -> None:
        self._engine, self._alone, self._random = engine, alone, random.Random(seed)

    def draft(self, state: Any) -> None:
        for seq in state.running:
            seq.draft = None
            if seq.computed < seq.length - 1 or self._random.random() < 0.2:
                continue
            right = self._alone[seq.live.request.id, seq.index].tokens[len(seq.output_ids) :]
            tree = self._random.random() < 0.5
            tokens: list[int] = []
            parents: list[int] = []
            for _ in range(self._random.randint(1, 6)):
                parent = self._random.randint(-1, len(tokens) - 1) if tree else len(tokens) - 1
                depth, at = 0, parent
                while at >= 0:
                    depth, at = depth + 1, parents[at]
                token = right[depth] if depth < len(right) and self._random.random() < 0.8 else 3
                if any(p == parent and t == token for p, t in zip(parents, tokens)):
                    continue
                tokens.append(token)
                parents.append(parent)
            draft = Draft(tokens, parents if tree else None)
            seq.draft = draft if seq.grammar is None else seq.grammar.prune(draft)

    def verified(self, seq: Any, drafted: int, accepted: int, said: Any) -> None:
        assert 0 <= accepted <= drafted and len(said) == accepted + 1

    def forget(self, seq: Any) -> None:
        seq.draft = None

    def check(self) -> None: ...


batchings = st.one_of(
    st.builds(
        ContinuousBatching,
        prefill_chunk=st.none() | st.integers(1, 20),
        ageing=st.sampled_from([1, 50, 1 << 16]),
        preempt_by=st.sampled_from(["auto", "recompute", "swap"]),
    ),
    st.builds(StaticBatching, padded=st.booleans()),
)


@every
@given(limits_of(), arrivals(), batchings, st.integers(1, 8), st.none() | st.integers(0, 99), st.booleans())
def test_tokens_are_those_of_the_request_alone(
    bounds: ExecutorLimits,
    plan: list[Arrival],
    batching: Batching,
    max_num_seqs: int,
    guesses: int | None,
    cached: bool,
) -> None:
    if isinstance(batching, StaticBatching):
        guesses = None
    elif batching.preempt_by == "swap" and not bounds.swap_pages:
        batching = ContinuousBatching()
    compare(bounds, plan, batching, max_num_seqs, guesses=guesses, cached=cached)


@st.composite
def crowds(draw: st.DrawFn) -> list[Arrival]:
    """Requests that come together, with short prompts that get in and long outputs that do not fit."""
    return [
        Arrival(
            step=draw(st.integers(0, 3)),
            request=request(
                f"r{i}",
                draw(st.lists(st.integers(0, 49), min_size=1, max_size=20)),
                priority=draw(st.integers(0, 1)),
                temperature=1.0,
                seed=i,
                max_tokens=draw(st.integers(20, 60)),
            ),
            abort_after=draw(st.none() | st.integers(10, 60)),
        )
        for i in range(draw(st.integers(3, 6)))
    ]


@every
@given(
    st.integers(4, 40),
    st.integers(5, 7),
    crowds(),
    st.none() | st.integers(1, 9),
    st.sampled_from([None, 30, 2]),
    st.integers(0, 7),
    st.none() | st.integers(0, 9),
    st.booleans(),
)
def test_preemption_changes_no_token(
    max_tokens: int,
    pages: int,
    plan: list[Arrival],
    chunk: int | None,
    window: int | None,
    slower: int,
    guesses: int | None,
    cached: bool,
) -> None:
    stats = compare(
        limits(max_tokens=max_tokens, pages=(pages,), windows=(window,), swap_pages=(slower,)),
        plan,
        ContinuousBatching(prefill_chunk=chunk, preempt_by="swap" if slower else "recompute"),
        max_num_seqs=4,
        guesses=guesses,
        cached=cached,
    )
    target(float(stats.preemptions))
    target(float(stats.swaps), label="swaps")


def compare(
    bounds: ExecutorLimits,
    plan: list[Arrival],
    batching: Batching,
    max_num_seqs: int,
    *,
    guesses: int | None = None,
    cached: bool = False,
) -> Stats:
    """Runs the plan, checking integrity at every step, and every request by itself with nothing on."""
    expected: dict[tuple[str, int], Got] = {}
    refused = set()
    limit = min(bounds.max_model_len, min(bounds.pages) * bounds.page_size)
    roomy = replace(bounds, pages=(100,) * len(bounds.pages), swap_pages=(), max_model_len=limit)
    for a in plan:
        try:
            make_bare(NullExecutor(bounds)).submit(a.request)
        except (ContextLengthError, MemoryBudgetError):
            refused.add(a.request.id)
        else:
            expected.update(Client(make_bare(NullExecutor(roomy))).run(a.request))
    engine = Engine(
        executor(bounds),
        batching=batching,
        max_num_seqs=min(max_num_seqs, bounds.max_tokens),
        prefix_cache=PrefixCache() if cached else None,
    )
    return run_plan(engine, [a for a in plan if a.request.id not in refused], expected, guesses)


def make_bare(executor: Executor) -> Engine:
    """One request at a time, and nothing on."""
    return Engine(executor, batching=ContinuousBatching(), max_num_seqs=1)


def run_plan(
    engine: Engine,
    plan: list[Arrival],
    expected: Mapping[tuple[str, int], Got],
    guesses: int | None,
) -> Stats:
    """Runs a plan and holds what comes to what is expected."""
    if guesses is not None:
        engine._speculator = Guess(engine, expected, guesses)
    client = Client(engine)
    for step in range(5000):
        for a in plan:
            if a.step == step:
                client.engine.submit(a.request)
            if a.abort_after is not None and a.step + a.abort_after == step:
                client.take(client.engine.abort(a.request.id))
                client.engine.check()
        client.step()
        if step > 30 and not client.engine.has_work():
            break
    assert not client.engine.has_work()
    assert client.engine.kv_usage == 0
    assert client.got.keys() == expected.keys()
    for key, got in client.got.items():
        want = expected[key]
        if got.reason == "abort":
            assert got.tokens == want.tokens[: len(got.tokens)]
        else:
            assert (got.tokens, got.reason, got.stop_reason) == (want.tokens, want.reason, want.stop_reason)
            assert got.logprobs == want.logprobs
            assert got.prompt_logprobs == want.prompt_logprobs
    return client.engine.stats()
