"""What `gossamer serve` runs where the user has not said all: the easy plan.

It is made in a process of its own, so that nothing of the search is left in the one that serves, whose memory
is planned to the end.
"""

from __future__ import annotations

import logging
import pickle
import subprocess
import sys
from collections.abc import Collection
from typing import TYPE_CHECKING

import typer

from gossamer.cli.engine_flags import EngineFlags
from gossamer.cli.said import decided
from gossamer.errors import DependencyError, GossamerError

if TYPE_CHECKING:
    from gossamer.config import EngineConfig

__all__ = ["answer", "easy_plan", "planned"]

_ENOUGH = {"weights", "kv", "seqs", "tokens", "context", "kv_bytes"}
_SECONDS = 300.0  # a plan takes one or two


def easy_plan(ctx: typer.Context, engine: EngineFlags) -> tuple[EngineConfig, str]:
    """The configuration to serve with, and what to say of its plan: flags that were given stand, the plan
    decides the others. Nothing is said where it would decide nothing, and of baselines, whose point is to be
    what they are.

    Raises GossamerError for flags that cannot be, and where nothing fits.
    """
    config = engine.config()
    given = decided(ctx, config)
    if given >= _ENOUGH or config.static_batching is not None or config.backend != "cpu":
        return config, ""
    asked = pickle.dumps((config, given))
    line = "from gossamer.cli.easy import answer; answer()"
    try:
        done = subprocess.run(
            [sys.executable, "-c", line], input=asked, capture_output=True, timeout=_SECONDS, check=True
        )
        found = pickle.loads(done.stdout)  # our own process wrote it
    except (OSError, subprocess.SubprocessError, pickle.UnpicklingError, EOFError) as cause:
        said = getattr(cause, "stderr", b"") or b""
        last = said.decode(errors="replace").strip().splitlines()[-1:]
        raise DependencyError(
            f"the plan could not be made ({''.join(last) or cause}); --no-plan serves without one"
        ) from None
    if isinstance(found, GossamerError):
        raise found
    config, text = found
    return config, text


def answer() -> None:
    """The other process: takes what was asked from standard input and writes the answer, or the refusal."""
    config, given = pickle.loads(sys.stdin.buffer.read())
    logging.getLogger("gossamer").setLevel(logging.ERROR)  # the start says what there is to say
    found: object
    try:
        found = planned(config, given)
    except GossamerError as error:
        found = error
    sys.stdout.buffer.write(pickle.dumps(found))


def planned(config: EngineConfig, given: Collection[str]) -> tuple[EngineConfig, str]:
    """The chosen configuration and two lines about it."""
    from gossamer.cli.show_plan import two_lines
    from gossamer.memory import available_memory
    from gossamer.planner.model import open_planned
    from gossamer.planner.objectives import Goal, Limits
    from gossamer.planner.plan import make_plan
    from gossamer.planner.remembered import rates_at_hand

    there = available_memory()
    budget = there if config.memory_budget is None else min(there, config.memory_budget)
    model = open_planned(config)
    most = config.max_model_len or model.graph.max_positions
    kernels, parallel = config.hardware_kernels, config.parallel_computing
    rates = rates_at_hand(
        "scalar" if kernels is None else kernels.isa, 1 if parallel is None else parallel.threads
    )
    goal = Goal.of("easy", Limits(memory=budget), most=most)
    plan = make_plan(model, config, goal, rates, given=given, brief=True)
    return plan.chosen.config, two_lines(plan)
