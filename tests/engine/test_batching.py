from __future__ import annotations

from gossamer.config import ContinuousBatching, StaticBatching
from gossamer.engine.engine import Engine
from gossamer.engine.step import StepPlan
from gossamer.runtime.null import NullExecutor
from tests.engine.serving import Client, alone, limits, make, request


class Recorder(NullExecutor):
    """Keeps its plans, as (tokens, sampled rows) per span."""

    def __init__(self, **changes: object) -> None:
        super().__init__(limits(**changes))
        self.plans: list[list[tuple[int, int]]] = []

    def submit(self, plan: StepPlan) -> int:
        self.plans.append([(len(span.tokens), len(span.rows)) for span in plan.spans])
        return super().submit(plan)


def record(
    batching: object, *requests: object, max_num_seqs: int = 8, **changes: object
) -> list[list[tuple[int, int]]]:
    executor = Recorder(**changes)
    Client(Engine(executor, batching=batching, max_num_seqs=max_num_seqs)).run(*requests)  # type: ignore[arg-type]
    return executor.plans


def test_decodes_and_chunks_share_one_budget() -> None:
    plans = record(
        ContinuousBatching(), request("a", max_tokens=4), request("b", range(40), max_tokens=2), max_tokens=20
    )
    assert plans == [[(3, 1), (17, 0)], [(1, 1), (19, 0)], [(1, 1), (4, 1)], [(1, 1), (1, 1)]]


def test_a_chunk_bounds_what_one_prompt_takes_of_a_step() -> None:
    plans = record(
        ContinuousBatching(prefill_chunk=8), request("a", range(20), max_tokens=1), request("b", max_tokens=1)
    )
    assert plans == [[(8, 0), (3, 1)], [(8, 0)], [(4, 1)]]


def test_requests_leave_and_join_between_steps() -> None:
    plans = record(
        ContinuousBatching(),
        request("a", max_tokens=2),
        request("b", max_tokens=4),
        request("c", max_tokens=2),
        max_num_seqs=2,
    )
    assert plans == [[(3, 1), (3, 1)], [(1, 1), (1, 1)], [(1, 1), (3, 1)], [(1, 1), (1, 1)]]


def test_ragged_drops_finished_rows_and_admits_no_one() -> None:
    plans = record(
        StaticBatching(),
        request("a", max_tokens=2),
        request("b", range(5), max_tokens=4),
        request("c", max_tokens=1),
        max_num_seqs=2,
    )
    assert plans == [[(3, 1), (5, 1)], [(1, 1), (1, 1)], [(1, 1)], [(1, 1)], [(3, 1)]]


def test_padded_fills_prompts_up_and_computes_finished_rows() -> None:
    plans = record(
        StaticBatching(padded=True),
        request("a", max_tokens=2),
        request("b", range(5), max_tokens=4),
        request("c", max_tokens=1),
        max_num_seqs=2,
    )
    assert plans == [[(5, 1), (5, 1)], *[[(1, 1), (1, 1)]] * 3, [(3, 1)]]


def test_padded_prefill_keeps_the_budget_and_comes_before_every_decode() -> None:
    plans = record(
        StaticBatching(padded=True),
        request("a", max_tokens=2),
        request("b", range(20), max_tokens=2),
        max_tokens=8,
    )
    assert plans == [[(8, 1)], [(8, 0)], [(4, 0), (4, 0)], [(8, 0)], [(8, 1)], [(1, 1), (1, 1)]]


def test_a_static_batch_reserves_its_longest_and_never_preempts() -> None:
    for padded in (False, True):
        client = Client(make(batching=StaticBatching(padded=padded), pages=(4,)))
        client.run(*(request(id, max_tokens=29) for id in "abc"))
        assert client.engine.stats().preemptions == 0


def test_contiguous_kv_admits_one_sequence_per_slot() -> None:
    most = 0

    def look() -> None:
        nonlocal most
        most = max(most, client.engine.stats().running)

    client = Client(make(page_size=128, pages=(3,)))
    client.run(*(request(id) for id in "abcdef"), each=look)
    assert most == 3


def test_preemption_recomputes_and_emits_nothing_twice() -> None:
    requests = [request(id, range(14), max_tokens=40) for id in "abc"]
    client = Client(make(pages=(6,)))
    got = client.run(*requests)
    assert client.engine.stats().preemptions > 0
    for r in requests:
        assert got[r.id, 0].tokens == alone(r)[r.id, 0].tokens


def test_the_newest_and_least_important_give_way() -> None:
    client = Client(make(pages=(4,)))
    finished: list[str] = []

    def look() -> None:
        finished.extend(id for (id, _), g in client.got.items() if g.reason and id not in finished)

    late = [
        request(id, range(14), max_tokens=40, priority=p) for id, p in (("old", 1), ("new", 1), ("first", 0))
    ]
    client.run(*late, each=look)
    assert finished == ["first", "old", "new"]


def test_lower_priority_numbers_go_first_then_arrival() -> None:
    client = Client(make(max_num_seqs=1))
    order = [request("c", priority=1), request("a"), request("d", priority=1), request("b")]
    client.run(*order)
    assert sorted(client.got, key=lambda key: client.got[key].times["finished"]) == [(id, 0) for id in "abcd"]


def test_aborts_do_not_pile_up_in_the_queue() -> None:
    engine = make(max_num_seqs=1)
    engine.submit(request("first", max_tokens=100))
    for i in range(1000):
        engine.submit(request(f"gone {i}"))
        engine.abort(f"gone {i}")
        engine.check()
    assert engine.stats().waiting == 1
    assert len(engine._state.waiting._heap) <= 4
