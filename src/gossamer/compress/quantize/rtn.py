"""Round-to-nearest: every matrix by itself, without calibration."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from gossamer.checkpoint.codes import Codes
from gossamer.checkpoint.weights import evaluate
from gossamer.compress.quantize.life import OUTSIDE, Step, keep, open_step, write
from gossamer.compress.quantize.plan import Plan, formats_of, matrix_names
from gossamer.compress.quantize.rounding import round_to_nearest
from gossamer.compress.step import Estimate, Job
from gossamer.config.compression import RTN
from gossamer.errors import CheckpointError
from gossamer.graph.ir import Graph
from gossamer.graph.weights import leaves

__all__ = ["estimate", "round_model", "round_outside", "round_planes", "rounded", "run"]

_SECOND = 50e6  # weights rounded in one


def estimate(config: RTN, graph: Graph, tokens: int, flops: float) -> Estimate:
    """See `StepRunner`."""
    sizes = [int(np.prod(w.shape)) for w in graph.weights.values()]
    return Estimate(seconds=sum(sizes) / _SECOND, memory=12 * max(sizes), disk=sum(sizes))


def run(config: RTN, job: Job) -> dict[str, Any]:
    """See `StepRunner`."""
    step = open_step(job)
    plan = formats_of(step.graph, config.format, config.overrides)
    round_model(step, plan)
    return {"method": "rtn"} | write(step, plan)


def round_model(step: Step, plan: Plan) -> None:
    """Fills the results of all blocks."""
    blocks, _ = matrix_names(step.graph)
    for done, (scope, names) in enumerate(blocks.items()):
        step.job.check_stop()
        step.job.progress("rounding", done, len(blocks))
        if scope not in step.results:
            keep(step, scope, {name: rounded(step, plan, name) for name in names if name in plan})
    round_outside(step, plan)


def round_outside(step: Step, plan: Plan) -> None:
    """Fills the results of what belongs to no block."""
    _, outside = matrix_names(step.graph)
    if OUTSIDE not in step.results:
        keep(step, OUTSIDE, {name: rounded(step, plan, name) for name in outside if name in plan})


def rounded(step: Step, plan: Plan, name: str) -> list[Codes]:
    """A matrix's planes, rounded. Raises CheckpointError for NaN or infinity."""
    weight, choice = step.graph.weights[name], plan[name]
    value = torch.from_numpy(np.array(evaluate(weight.expr, step.source), np.float32))
    if not torch.isfinite(value).all():
        tensors = ", ".join(leaf.name for leaf in leaves(weight.expr))
        raise CheckpointError(f"tensor {tensors} holds NaN or infinity; the checkpoint is damaged")
    for leaf in leaves(weight.expr):
        step.source.release(leaf.name)
    return round_planes(value, choice.format, choice.group)


def round_planes(weight: torch.Tensor, format: str, group: int) -> list[Codes]:
    """A matrix [N, K], or each of a stack of them, rounded."""
    planes = weight.detach() if weight.ndim == 3 else weight.detach()[None]
    return [round_to_nearest(plane, format, group) for plane in planes]
