"""GPTQ block by block: every block is calibrated on what the quantized blocks before it give."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from gossamer.backends.reference import ReferenceModel
from gossamer.checkpoint.codes import Codes
from gossamer.compress.blocks import BlockAt, Blocks, Site, walk_memory
from gossamer.compress.hessian import Hessian, collect
from gossamer.compress.quantize.gptq_weights import gptq
from gossamer.compress.quantize.life import OUTSIDE, Step, keep, open_step, put_back, write
from gossamer.compress.quantize.plan import Plan, formats_of, matrix_names
from gossamer.compress.quantize.rtn import rounded
from gossamer.compress.step import Estimate, Job
from gossamer.config.compression import GPTQ
from gossamer.graph.ir import Graph
from gossamer.graph.ops.attention import KVState, SpanRows
from gossamer.graph.part import part

__all__ = ["estimate", "gptq_block", "gptq_model", "run"]

_COLUMN = 2e-4  # seconds of one in Python
_ROWS = 4096


def estimate(config: GPTQ, graph: Graph, tokens: int, flops: float) -> Estimate:
    """See `StepRunner`. Attention's products of tokens with tokens are not counted."""
    blocks, _ = matrix_names(graph)
    shapes = [graph.weights[name].shape for names in blocks.values() for name in names]
    weights = [math.prod(shape) for shape in shapes]
    widest = max(shape[-1] for shape in shapes)
    # Two passes over the tokens, one for inputs and one for outputs, and about one Hessian for two matrices.
    passes = 4.0 * sum(weights) + sum(shape[-1] ** 2 for shape in shapes)
    solving = sum(2.0 * size * shape[-1] for size, shape in zip(weights, shapes, strict=True))
    columns = sum(shape[-1] for shape in shapes)
    largest = max(sum(math.prod(graph.weights[n].shape) for n in names) for names in blocks.values())
    return Estimate(
        seconds=1.3 * (tokens * passes + solving) / flops + columns * _COLUMN,
        memory=walk_memory(graph, tokens) + 12 * largest + 40 * widest**2,
        disk=sum(math.prod(w.shape) for w in graph.weights.values()),
    )


def run(config: GPTQ, job: Job) -> dict[str, Any]:
    """See `StepRunner`."""
    step = open_step(job)
    plan = formats_of(step.graph, config.format, config.overrides)
    gptq_model(step, plan, config)
    return {"method": "gptq", "act_order": config.act_order} | write(step, plan)


def gptq_model(step: Step, plan: Plan, config: GPTQ) -> None:
    """Fills the results of all blocks; those that are there already are taken as they are."""
    walk = Blocks(step.graph, step.source, step.job.calibration())
    for done, block in enumerate(walk):
        step.job.check_stop()
        step.job.progress("gptq", done, len(walk))
        if block.scope not in step.results:
            keep(step, block.scope, gptq_block(block, collect(block), plan, config))
        for name in block.model.graph.weights:
            if name in plan:
                put_back(step, block.scope, plan, name, block.matrix(name))
    gptq_outside(step, walk, plan, config)
    step.job.progress("gptq", len(walk), len(walk))


def gptq_block(
    block: BlockAt, hessians: Mapping[Site, Hessian], plan: Plan, config: GPTQ
) -> dict[str, list[Codes]]:
    """The planes of every matrix of a block that the plan names. hessians: of the block's sites."""
    made: dict[str, list[Codes]] = {}
    for site, hessian in hessians.items():
        names = [name for name in site.matrices if name in plan]
        if not names:
            continue
        mean = hessian.mean()
        together: dict[tuple[str, int], list[str]] = {}  # rows over the same inputs are one matrix
        for name in names:
            together.setdefault((plan[name].format, plan[name].group), []).append(name)
        for (format, group), same in together.items():
            weights = [block.matrix(name, site.plane) for name in same]
            codes = _solved(torch.cat(weights), mean, format, group, config)
            start = 0
            for name, weight in zip(same, weights, strict=True):
                made.setdefault(name, []).append(codes.rows(start, start + len(weight)))
                start += len(weight)
    return made


def gptq_outside(step: Step, walk: Blocks, plan: Plan, config: GPTQ) -> None:
    """The embedding is rounded to nearest: no sums are made of it. A head of its own is calibrated on what
    the last block gives."""
    if OUTSIDE in step.results:
        return
    _, outside = matrix_names(step.graph)
    made = {name: rounded(step, plan, name) for name in outside if name in plan}
    node = next(n for n in reversed(step.graph.nodes) if n.op == "linear")
    head = node.weights[0]
    if head in made and not node.scope:
        end = step.graph.nodes[max(i for i, n in enumerate(step.graph.nodes) if n.scope) + 1 :]
        model = ReferenceModel.load(part(step.graph, end, {"x": node.inputs[0]}), step.source)
        hidden = next(v for n in end for v in n.inputs if v not in step.graph.inputs)
        hessian = Hessian(step.graph.weights[head].shape[1])
        with torch.no_grad():
            for start in range(0, len(walk.hidden), _ROWS):
                rows = walk.hidden[start : start + _ROWS]
                ids = torch.arange(len(rows))
                state = KVState((SpanRows(0, 0, len(rows), 0),))
                hessian.add(model(ids, ids, ids, state, ("x",), {hidden: rows})["x"])
            weight = model.weight(head)
        choice = plan[head]
        made[head] = [_solved(weight, hessian.mean(), choice.format, choice.group, config)]
    keep(step, OUTSIDE, made)


def _solved(weight: torch.Tensor, hessian: torch.Tensor, format: str, group: int, config: GPTQ) -> Codes:
    return gptq(
        weight,
        hessian,
        format,
        group,
        act_order=config.act_order,
        damping=config.damping,
        search=config.search,
    )
