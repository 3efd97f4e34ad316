"""SmoothQuant block by block (Xiao et al., 2023): int8 weights with a scale per output and int8 activations,
whose outliers move into the weights; activations have a scale per token, or one from calibration.

Every block is calibrated on what the quantized blocks before it give.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from gossamer.checkpoint.codes import Codes
from gossamer.compress.blocks import BlockAt, Blocks, Site, walk_memory
from gossamer.compress.model import calibration
from gossamer.compress.quantize.life import Step, keep, open_step, put_back, write
from gossamer.compress.quantize.moved import changed_floats, put_floats_back, readers_of
from gossamer.compress.quantize.plan import Plan, formats_of, matrix_names
from gossamer.compress.quantize.rounding import round_to_nearest
from gossamer.compress.quantize.rtn import round_outside
from gossamer.compress.quantize.scaling import Scaling, scale, scalings
from gossamer.compress.quantize.smooth_weights import (
    Sample,
    Smoothed,
    best_share,
    clipping_losses,
    smoothed,
)
from gossamer.compress.step import Estimate, Job
from gossamer.config.compression import SmoothQuant
from gossamer.errors import CheckpointError
from gossamer.graph.ir import Graph

__all__ = ["estimate", "run", "smooth_block", "smooth_model"]

_TOKENS = 1024  # of a site by which factors are judged


def estimate(config: SmoothQuant, graph: Graph, tokens: int, flops: float) -> Estimate:
    """See `StepRunner`. Attention's products of tokens with tokens are not counted."""
    blocks, _ = matrix_names(graph)
    shapes = [graph.weights[name].shape for names in blocks.values() for name in names]
    weights = sum(math.prod(shape) for shape in shapes)
    passes = 3 if config.activations == "static" else 2
    tried = 22 if config.alpha is None else 0
    largest = max(sum(math.prod(graph.weights[n].shape) for n in names) for names in blocks.values())
    widest = max(shape[-1] for shape in shapes)
    return Estimate(
        seconds=1.5 * (2.0 * passes * tokens + 2.0 * tried * min(tokens, _TOKENS)) * weights / flops,
        memory=walk_memory(graph, tokens) + 20 * largest + 64 * _TOKENS * widest,
        disk=sum(math.prod(w.shape) for w in graph.weights.values()),
    )


def run(config: SmoothQuant, job: Job) -> dict[str, Any]:
    """See `StepRunner`."""
    step = open_step(job)
    plan = formats_of(step.graph, "int8", config.overrides)
    smooth_model(step, plan, config)
    facts = {"method": "smoothquant", "alpha": config.alpha, "activations": config.activations}
    return facts | write(step, plan)


def smooth_model(step: Step, plan: Plan, config: SmoothQuant) -> None:
    """Fills the results of all blocks; those that are there already are taken as they are."""
    walk = Blocks(step.graph, step.source, calibration(step.graph, step.job))
    for done, block in enumerate(walk):
        step.job.check_stop()
        step.job.progress("smoothquant", done, len(walk))
        if block.scope not in step.results:
            moved, codes, scales = smooth_block(step.graph, block, plan, config)
            keep(step, block.scope, codes, changed_floats(step, block, moved, plan), scales)
        for name in block.model.graph.weights:
            if name in plan:
                put_back(step, block.scope, plan, name, block.matrix(name))
        put_floats_back(step, block)
    round_outside(step, plan)
    step.job.progress("smoothquant", len(walk), len(walk))


@torch.no_grad()
def smooth_block(
    graph: Graph, block: BlockAt, plan: Plan, config: SmoothQuant
) -> tuple[list[Scaling], dict[str, list[Codes]], dict[str, float]]:
    """Moves factors within a block's weights, in place; gives what was moved, the planes of every matrix that
    the plan names, and the activation scales of those that have one."""
    samples = _samples(block)
    moved: list[Scaling] = []
    for scaling in scalings(graph, block.block):
        sites, factor = readers_of(scaling, samples)
        if scaling.kind == "key" or not any(name in plan for site in sites for name in site.matrices):
            continue
        readers = [
            _reader(block, plan, site, name, samples, config) for site in sites for name in site.matrices
        ]
        factors, alpha = smoothed(readers, factor, scaling.size, config.alpha)
        if alpha is not None:
            scale(block.model, scaling, factors)
            for site in sites:
                samples[site].divide(factors if factor is None else factors[list(factor)])
            moved.append(scaling)
    scales = _static_scales(block, plan, samples) if config.activations == "static" else {}
    codes: dict[str, list[Codes]] = {}
    for site in samples:
        for name in site.matrices:
            if name in plan:
                weight, choice = block.matrix(name, site.plane), plan[name]
                codes.setdefault(name, []).append(round_to_nearest(weight, choice.format, choice.group))
    return moved, codes, scales


def _samples(block: BlockAt) -> dict[Site, Sample]:
    every = max(1, block.walk.batch * block.walk.length // _TOKENS)
    samples = {
        site: Sample(block.matrix(site.matrices[0], site.plane).shape[1], every) for site in block.sites()
    }
    block.inputs(lambda site, x: samples[site].add(x))
    for site, sample in samples.items():
        if not torch.isfinite(sample.largest_K).all():
            raise CheckpointError(
                f"{site.value}: activations on the calibration text are NaN or infinite; "
                "the checkpoint is damaged, or the steps before broke it"
            )
    return samples


def _static_scales(block: BlockAt, plan: Plan, samples: Mapping[Site, Sample]) -> dict[str, float]:
    """Matrix -> the scale of its activations: one for all that read a value, planes of experts together."""
    by_value: dict[str, list[Site]] = {}
    for site in samples:
        if any(_is_static(plan, name) for name in site.matrices):
            by_value.setdefault(site.value, []).append(site)
    largest = {
        value: max(float(samples[site].largest_K.max()) for site in sites)
        for value, sites in by_value.items()
    }
    importance = {
        site: sum(
            (
                block.matrix(name, site.plane).square().sum(0)
                for name in site.matrices
                if _is_static(plan, name)
            ),
            torch.zeros_like(samples[site].largest_K),
        )
        for sites in by_value.values()
        for site in sites
    }
    losses: dict[str, torch.Tensor] = {}

    def observe(site: Site, x: torch.Tensor) -> None:
        if site in importance:
            found = clipping_losses(x, importance[site], largest[site.value])
            losses[site.value] = losses.get(site.value, torch.zeros_like(found)) + found

    block.inputs(observe)
    scales: dict[str, float] = {}
    for value, sites in by_value.items():
        # Activations that are 0 throughout have any scale.
        scale = float(np.float32(best_share(losses[value]) * largest[value] / 127)) or 1.0
        for site in sites:
            scales |= {name: scale for name in site.matrices if _is_static(plan, name)}
    return scales


def _is_static(plan: Plan, name: str) -> bool:
    return name in plan and (plan[name].format, plan[name].group) == ("int8", 0)


def _reader(
    block: BlockAt,
    plan: Plan,
    site: Site,
    name: str,
    samples: Mapping[Site, Sample],
    config: SmoothQuant,
) -> Smoothed:
    format, group = (plan[name].format, plan[name].group) if name in plan else ("f32", 0)
    static = config.activations == "static" and _is_static(plan, name)
    return Smoothed(block.matrix(name, site.plane), samples[site], format, group, static)
