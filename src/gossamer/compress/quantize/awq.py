"""AWQ block by block (Lin et al., "AWQ: Activation-aware Weight Quantization", 2024): factors move from the
weights before a value into the columns that read it, ranges of groups are clipped, and then it is rounded.

Every block is calibrated on what the quantized blocks before it give.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from gossamer.checkpoint.codes import Codes
from gossamer.compress.blocks import BlockAt, Blocks, Site, walk_memory
from gossamer.compress.hessian import collect
from gossamer.compress.model import calibration
from gossamer.compress.quantize.awq_weights import Reader, best_factors, clipped_grid, spread
from gossamer.compress.quantize.life import Step, keep, open_step, put_back, write
from gossamer.compress.quantize.moved import changed_floats, put_floats_back, readers_of
from gossamer.compress.quantize.plan import Plan, formats_of, matrix_names
from gossamer.compress.quantize.rounding import grid_of
from gossamer.compress.quantize.rtn import round_outside
from gossamer.compress.quantize.scaling import Scaling, scale, scalings
from gossamer.compress.step import Estimate, Job
from gossamer.config.compression import AWQ
from gossamer.graph.ir import Graph

__all__ = ["awq_block", "awq_model", "estimate", "run"]


def estimate(config: AWQ, graph: Graph, tokens: int, flops: float) -> Estimate:
    """See `StepRunner`. Attention's products of tokens with tokens are not counted."""
    blocks, _ = matrix_names(graph)
    shapes = [graph.weights[name].shape for names in blocks.values() for name in names]
    widest = max(shape[-1] for shape in shapes)
    # Two passes over the tokens (inputs, outputs) and their second moments; then a product with these for
    # every exponent, of at most 1024 rows a matrix, and the groups' own for every range.
    passes = sum(4.0 * math.prod(shape) + shape[-1] ** 2 for shape in shapes)
    searched = sum(math.prod(s[:-2]) * min(s[-2], 1024) * s[-1] for s in shapes)
    ranges = 22 * 2.0 * sum(math.prod(shape) for shape in shapes) * 128 if config.clip else 0.0
    largest = max(sum(math.prod(graph.weights[n].shape) for n in names) for names in blocks.values())
    return Estimate(
        seconds=1.5 * (tokens * passes + config.grid * 2.0 * searched * widest + ranges) / flops,
        memory=walk_memory(graph, tokens) + 24 * largest + 40 * widest**2,
        disk=sum(math.prod(w.shape) for w in graph.weights.values()),
    )


def run(config: AWQ, job: Job) -> dict[str, Any]:
    """See `StepRunner`."""
    step = open_step(job)
    plan = formats_of(step.graph, config.format, config.overrides)
    awq_model(step, plan, config)
    return {"method": "awq", "grid": config.grid, "clip": config.clip} | write(step, plan)


def awq_model(step: Step, plan: Plan, config: AWQ) -> None:
    """Fills the results of all blocks; those that are there already are taken as they are."""
    walk = Blocks(step.graph, step.source, calibration(step.graph, step.job))
    for done, block in enumerate(walk):
        step.job.check_stop()
        step.job.progress("awq", done, len(walk))
        if block.scope not in step.results:
            moved, codes = awq_block(step.graph, block, plan, config)
            keep(step, block.scope, codes, changed_floats(step, block, moved, plan))
        for name in block.model.graph.weights:
            if name in plan:
                put_back(step, block.scope, plan, name, block.matrix(name))
        put_floats_back(step, block)
    round_outside(step, plan)
    step.job.progress("awq", len(walk), len(walk))


@torch.no_grad()
def awq_block(
    graph: Graph, block: BlockAt, plan: Plan, config: AWQ
) -> tuple[list[Scaling], dict[str, list[Codes]]]:
    """Moves factors within a block's weights, in place; gives what was moved, and the planes of every matrix
    that the plan names."""
    moments = {site: hessian.mean() * hessian.tokens for site, hessian in collect(block).items()}
    moved: list[Scaling] = []
    for scaling in scalings(graph, block.block):
        sites, factor = readers_of(scaling, moments)
        if scaling.kind == "key" or not any(name in plan for site in sites for name in site.matrices):
            continue
        readers = [_reader(block, plan, site, name, moments) for site in sites for name in site.matrices]
        factors, exponent = best_factors(readers, factor, scaling.size, config.grid)
        if exponent:
            scale(block.model, scaling, factors)
            inverse_K = 1 / spread(factors, factor)
            for site in sites:
                moments[site] = moments[site] * inverse_K * inverse_K[:, None]
            moved.append(scaling)
    codes: dict[str, list[Codes]] = {}
    for site in moments:
        for name in site.matrices:
            if name in plan:
                choice, weight = plan[name], block.matrix(name, site.plane)
                grid = (
                    clipped_grid(weight, moments[site], choice.format, choice.group)
                    if config.clip
                    else grid_of(weight, choice.format, choice.group)
                )
                codes.setdefault(name, []).append(grid.stored(grid.codes(weight)))
    return moved, codes


def _reader(
    block: BlockAt, plan: Plan, site: Site, name: str, moments: Mapping[Site, torch.Tensor]
) -> Reader:
    format, group = (plan[name].format, plan[name].group) if name in plan else ("f32", 0)
    return Reader(block.matrix(name, site.plane), moments[site], format, group)
