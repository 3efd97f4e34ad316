"""Who makes room keeps its pages on the slower tier where that is asked for, or cheaper."""

from __future__ import annotations

import pytest

from gossamer.config import ContinuousBatching
from gossamer.config.continuous_batching import PreemptBy
from gossamer.engine.engine import Engine
from gossamer.engine.step_times import StepTimes
from gossamer.errors import ConfigError
from tests.engine.serving import Client, alone, make, request

pytestmark = pytest.mark.usefixtures("overlaps")

REQUESTS = [request(f"r{i}", [i] * 20, max_tokens=60, temperature=1.0, seed=i) for i in range(4)]


class Priced(StepTimes):
    """A token of a prompt takes 1 ms; moving a page what is said."""

    def __init__(self, page: float) -> None:
        super().__init__()
        self.page = page

    def prefill_seconds(self, tokens: int) -> float:
        return 1e-3 * tokens

    def swap_seconds(self, pages: int) -> float:
        return self.page * pages


def crowded(preempt_by: PreemptBy, swap_pages: tuple[int, ...]) -> Engine:
    return make(batching=ContinuousBatching(preempt_by=preempt_by), pages=(9,), swap_pages=swap_pages)


def computed(engine: Engine) -> int:
    got = Client(engine).run(*REQUESTS)
    for r in REQUESTS:
        assert got[r.id, 0].tokens == alone(r)[r.id, 0].tokens
    stats = engine.stats()
    assert stats.preemptions > 0
    return stats.computed_tokens


def test_swapped_pages_need_not_be_computed_again() -> None:
    needed = sum(len(r.prompt_ids) + 60 - 1 for r in REQUESTS)
    assert computed(crowded("recompute", (0,))) > needed
    swapping = crowded("swap", (40,))
    assert computed(swapping) == needed
    assert swapping.stats().swaps == swapping.stats().preemptions


def test_a_full_tier_leaves_recomputation() -> None:
    engine = crowded("swap", (1,))
    computed(engine)
    assert engine.stats().swaps < engine.stats().preemptions


def test_the_cheaper_is_what_was_measured() -> None:
    for price, swaps in ((1e-6, True), (1e3, False)):
        engine = crowded("auto", (40,))
        engine._state.times = Priced(price)
        computed(engine)
        assert (engine.stats().swaps > 0) == swaps


def test_aborted_in_the_queue_it_gives_its_slots_back() -> None:
    engine = crowded("swap", (40,))
    client = Client(engine)
    for r in REQUESTS:
        engine.submit(r)
    while not engine.stats().swaps:
        client.step()
    pool = engine._state.slower[0]
    assert pool.available < pool.size
    for r in REQUESTS:
        client.take(engine.abort(r.id))
        engine.check()
    assert pool.available == pool.size


def test_swap_without_a_tier_is_refused() -> None:
    with pytest.raises(ConfigError, match="swap"):
        crowded("swap", ())
