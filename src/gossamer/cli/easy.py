"""What `gossamer serve` runs where the user has not said all: the easy plan."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import typer

from gossamer.cli.engine_flags import EngineFlags
from gossamer.cli.said import decided

if TYPE_CHECKING:
    from gossamer.config import EngineConfig
    from gossamer.planner.plan import Plan

__all__ = ["easy_plan"]

_ENOUGH = {"weights", "kv", "seqs", "tokens", "context", "kv_bytes"}


def easy_plan(ctx: typer.Context, engine: EngineFlags) -> tuple[EngineConfig, Plan | None]:
    """The configuration to serve with, and the plan behind it: flags that were given stand, the plan decides
    the others. None where it would decide nothing, and for baselines, whose point is to be what they are.

    Raises GossamerError for flags that cannot be, and where nothing fits.
    """
    config = engine.config()
    given = decided(ctx, config)
    if given >= _ENOUGH or config.static_batching is not None or config.backend != "cpu":
        return config, None
    from gossamer.memory import available_memory
    from gossamer.planner.model import open_planned
    from gossamer.planner.objectives import Goal, Limits
    from gossamer.planner.plan import make_plan
    from gossamer.planner.remembered import rates_at_hand

    there = available_memory()
    budget = there if config.memory_budget is None else min(there, config.memory_budget)
    logger = logging.getLogger("gossamer")
    level = logger.level
    logger.setLevel(logging.ERROR)  # the start says the same of the checkpoint
    try:
        model = open_planned(config)
    finally:
        logger.setLevel(level)
    most = config.max_model_len or model.graph.max_positions
    goal = Goal.of("easy", Limits(memory=budget), most=most)
    kernels, parallel = config.hardware_kernels, config.parallel_computing
    rates = rates_at_hand(
        "scalar" if kernels is None else kernels.isa, 1 if parallel is None else parallel.threads
    )
    plan = make_plan(model, config, goal, rates, given=given, brief=True)
    return plan.chosen.config, plan
