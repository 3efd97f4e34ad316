"""Whatever happens around a request, it gets the tokens that it gets alone."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings, target
from hypothesis import strategies as st

from gossamer.config import ContinuousBatching, StaticBatching
from gossamer.engine.batching import Batching
from gossamer.engine.engine import Engine
from gossamer.engine.request import Request
from gossamer.engine.step import ExecutorLimits
from gossamer.errors import ContextLengthError, MemoryBudgetError
from gossamer.runtime.null import NullExecutor
from tests.engine.serving import Client, Got, limits, request


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
    )


@st.composite
def arrivals(draw: st.DrawFn) -> list[Arrival]:
    result = []
    for i in range(draw(st.integers(1, 10))):
        most = draw(st.none() | st.integers(1, 50))
        result.append(
            Arrival(
                step=draw(st.integers(0, 30)),
                request=request(
                    f"r{i}",
                    draw(st.lists(st.integers(0, 49), min_size=1, max_size=60)),
                    priority=draw(st.integers(0, 2)),
                    eos=tuple(draw(st.lists(st.integers(0, 49), max_size=2))),
                    n=draw(st.integers(1, 3)),
                    temperature=draw(st.sampled_from([0.0, 1.0])),
                    seed=draw(st.integers(0, 2**64 - 1)),
                    max_tokens=most,
                    min_tokens=draw(st.integers(0, most or 50)),
                    stop_token_ids=tuple(draw(st.lists(st.integers(0, 49), max_size=2))),
                    logprobs=draw(st.none() | st.integers(0, 3)),
                ),
                abort_after=draw(st.none() | st.integers(0, 20)),
            )
        )
    return result


batchings = st.one_of(
    st.builds(ContinuousBatching, prefill_chunk=st.none() | st.integers(1, 20)),
    st.builds(StaticBatching, padded=st.booleans()),
)


@settings(max_examples=150, deadline=None)
@given(limits_of(), arrivals(), batchings, st.integers(1, 8))
def test_tokens_are_those_of_the_request_alone(
    bounds: ExecutorLimits, plan: list[Arrival], batching: Batching, max_num_seqs: int
) -> None:
    compare(bounds, plan, batching, max_num_seqs)


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


@settings(max_examples=60, deadline=None)
@given(st.integers(4, 40), st.integers(5, 7), crowds(), st.none() | st.integers(1, 9))
def test_preemption_changes_no_token(
    max_tokens: int, pages: int, plan: list[Arrival], chunk: int | None
) -> None:
    preemptions = compare(
        limits(max_tokens=max_tokens, pages=(pages,)),
        plan,
        ContinuousBatching(prefill_chunk=chunk),
        max_num_seqs=4,
    )
    target(float(preemptions))


def compare(bounds: ExecutorLimits, plan: list[Arrival], batching: Batching, max_num_seqs: int) -> int:
    """Runs the plan, checking integrity at every step, and every request by itself; how many were
    preempted."""
    max_num_seqs = min(max_num_seqs, bounds.max_tokens)
    client = Client(Engine(NullExecutor(bounds), batching=batching, max_num_seqs=max_num_seqs))
    refused = set()
    for step in range(5000):
        for a in plan:
            if a.step == step:
                try:
                    client.engine.submit(a.request)
                except (ContextLengthError, MemoryBudgetError):
                    refused.add(a.request.id)
            if a.abort_after is not None and a.step + a.abort_after == step:
                client.take(client.engine.abort(a.request.id))
                client.engine.check()
        client.step()
        if step > 30 and not client.engine.has_work():
            break
    assert not client.engine.has_work()
    assert client.engine.kv_usage == 0

    expected: dict[tuple[str, int], Got] = {}
    for a in plan:
        if a.request.id not in refused:
            by_itself = Client(Engine(NullExecutor(bounds), batching=ContinuousBatching(), max_num_seqs=1))
            expected.update(by_itself.run(a.request))
    assert client.got.keys() == expected.keys()
    for key, got in client.got.items():
        want = expected[key]
        if got.reason == "abort":
            assert got.tokens == want.tokens[: len(got.tokens)]
        else:
            assert (got.tokens, got.reason, got.stop_reason) == (want.tokens, want.reason, want.stop_reason)
            assert got.logprobs == want.logprobs
    return client.engine.stats().preemptions
