"""The engine and those who guess: drafts that are right are kept coming, drafts that are wrong are not."""

from __future__ import annotations

import pytest

from gossamer.config import ContinuousBatching, SpeculativeDecoding
from gossamer.engine.engine import Engine
from gossamer.engine.step import StepPlan
from gossamer.runtime.null import NullExecutor
from tests.engine.serving import Client, alone, limits, request


def cost(plan: StepPlan) -> float:
    """Memory bounds the target's steps; the draft is twenty times as fast."""
    return 2e-3 + 2e-5 * plan.tokens if plan.program == "target" else 1e-4


@pytest.mark.parametrize(("agrees", "fewest", "most"), [(1.0, 40, 110), (0.0, 190, 200)])
def test_an_adaptive_draft_goes_on_while_it_pays(agrees: float, fewest: int, most: int) -> None:
    bounds = limits(max_model_len=256)
    executor = NullExecutor(bounds, cost=cost, draft_limits=bounds, draft_agrees=agrees)
    engine = Engine(
        executor,
        batching=ContinuousBatching(),
        max_num_seqs=4,
        speculation=SpeculativeDecoding(method="draft_model", model="any", num_speculative_tokens=4),
    )
    wanted = request("a", max_tokens=200)
    got = Client(engine).run(wanted)
    assert got["a", 0].tokens == alone(wanted, max_model_len=256)["a", 0].tokens
    assert fewest <= engine.stats().steps <= most
