"""Mixed bits: what each matrix loses in each candidate format is measured, and a solver chooses."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gossamer.checkpoint.codes import Codes
from gossamer.checkpoint.json_file import read_json_object
from gossamer.checkpoint.model_writer import write_json
from gossamer.compress.blocks import BlockAt, Site
from gossamer.compress.hessian import Hessian, collect
from gossamer.compress.quantize.allocation import Offer, least_bytes, least_loss
from gossamer.compress.quantize.gptq import estimate as gptq_estimate
from gossamer.compress.quantize.gptq import gptq_block, gptq_model
from gossamer.compress.quantize.life import OUTSIDE, Step, fill, open_step, write
from gossamer.compress.quantize.plan import Plan, formats_of, matrix_names, spelled
from gossamer.compress.quantize.rounding import stored_bytes
from gossamer.compress.quantize.rtn import estimate as rtn_estimate
from gossamer.compress.quantize.rtn import round_model, round_planes, rounded
from gossamer.compress.quantize.sensitivity import Sensitivity
from gossamer.compress.step import Estimate, Job
from gossamer.config.compression import GPTQ, RTN, MixedBits
from gossamer.errors import ConfigError
from gossamer.graph.ir import Graph
from gossamer.graph.weights import leaves
from gossamer.passes.weight_formats import FormatChoice

__all__ = ["SENSITIVITY", "Measured", "estimate", "run"]

SENSITIVITY = "gossamer_sensitivity.json"
_CONTEXT = 512

Losses = dict[str, dict[str, float]]
"""First matrix of a unit -> format -> nats per token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Matrices that have one format together, and what each candidate takes and loses. names: of weights;
    weights: how many; candidates: format as people write it -> offer."""

    names: tuple[str, ...]
    weights: int
    candidates: Mapping[str, Offer]


def estimate(config: MixedBits, graph: Graph, tokens: int, flops: float) -> Estimate:
    """See `StepRunner`. On average half of the model runs for every matrix; a window is taken to be of 512
    tokens."""
    made = (
        gptq_estimate(GPTQ(format=config.candidates[0]), graph, tokens, flops)
        if config.method == "gptq"
        else rtn_estimate(RTN(format=config.candidates[0]), graph, tokens, flops)
    )
    blocks, _ = matrix_names(graph)
    inside = [math.prod(graph.weights[n].shape) for names in blocks.values() for n in names]
    head = graph.vocab * graph.hidden
    trials = len(inside)
    seen = min(tokens, config.windows * _CONTEXT)
    return Estimate(
        seconds=made.seconds + trials * seen * (sum(inside) + 4.0 * head) / flops,
        memory=max(made.memory, 4 * sum(math.prod(w.shape) for w in graph.weights.values()) + (1 << 30)),
        disk=made.disk,
    )


def run(config: MixedBits, job: Job) -> dict[str, Any]:
    """See `StepRunner`."""
    step = open_step(job)
    plans = [formats_of(step.graph, candidate, config.overrides) for candidate in config.candidates]
    measured = measure(step, config, plans)
    chosen = allocate(config, measured)
    plan: dict[str, FormatChoice] = {}
    for unit, stored in zip(measured, chosen, strict=True):
        for name in unit.names:
            plan[name] = next(p[name] for p in plans if spelled(p[name]) == stored)
    if config.method == "gptq":
        gptq_model(step, plan, GPTQ(format=config.candidates[0]))
    else:
        round_model(step, plan)
    facts = write(step, plan)
    record = sensitivity_record(step, config, measured, chosen)
    write_json(job.out / SENSITIVITY, record)
    return {"method": f"mixed bits, {config.method}", "predicted_kl": record["predicted_kl"]} | facts


def units(graph: Graph, plan: Plan) -> list[tuple[str, ...]]:
    """Matrices of a plan that must have one format: those of one tensor, and gate and up of experts."""
    root: dict[str, str] = {name: name for name in plan}

    def find(name: str) -> str:
        while root[name] != name:
            name = root[name]
        return name

    owner: dict[str, str] = {}
    for name in plan:
        for leaf in leaves(graph.weights[name].expr):
            root[find(name)] = find(owner.setdefault(leaf.name, name))
    for node in graph.nodes:
        if node.op == "experts" and all(name in plan for name in node.weights[:2]):
            root[find(node.weights[1])] = find(node.weights[0])
    found: dict[str, list[str]] = {}
    for name in plan:
        found.setdefault(find(name), []).append(name)
    return [tuple(names) for names in found.values()]


def measure(step: Step, config: MixedBits, plans: Sequence[Plan]) -> list[Measured]:
    """What every unit loses in every candidate.

    Of a block's units the candidate of the largest error of outputs is measured to the logits; the others are
    taken to lose less as their errors are less, since to second order a loss is quadratic in the change, and
    errors of rounding differ by little but their size. Embedding and head are measured in every candidate.
    """
    job = step.job
    windows = job.calibration()
    windows = windows[np.linspace(0, len(windows) - 1, min(config.windows, len(windows))).astype(int)]
    sensitivity = Sensitivity(step.graph, step.source, windows)
    together = units(step.graph, plans[0])
    losses: dict[str, dict[str, float]] = {}
    for done, (block, loss) in enumerate(sensitivity):
        job.check_stop()
        job.progress("sensitivity", done, len(sensitivity))
        path = job.scratch / f"{OUTSIDE if block is None else block.scope}.sensitivity"
        if not path.exists():
            inside = [unit for unit in together if block is not None and unit[0] in block.model.graph.weights]
            if block is None:
                found = _measure_outside(step, plans, sensitivity, loss)
            else:
                found = _measure_block(block, config, plans, inside, sensitivity, loss)
            write_json(path, found)
        losses |= read_json_object(path)
    return [_measured(step.graph, unit, plans, losses[unit[0]]) for unit in together]


def _measure_block(
    block: BlockAt,
    config: MixedBits,
    plans: Sequence[Plan],
    together: Sequence[tuple[str, ...]],
    sensitivity: Sensitivity,
    loss: Callable[[], float],
) -> Losses:
    hessians = collect(block)
    names = {name for unit in together for name in unit}
    made: dict[str, dict[str, list[Codes]]] = {}  # format -> matrix -> planes
    for plan in plans:
        here = {n: plan[n] for n in names if n not in made.get(spelled(plan[n]), {})}
        if config.method == "gptq":
            codes = gptq_block(block, hessians, here, GPTQ())
        else:
            codes = {n: round_planes(block.matrix(n), c.format, c.group) for n, c in here.items()}
        for name, planes in codes.items():
            made.setdefault(spelled(plan[name]), {})[name] = planes
    found: Losses = {}
    for unit in together:
        formats = dict.fromkeys(spelled(plan[unit[0]]) for plan in plans)
        errors = {f: _error(block, hessians, unit, made[f]) for f in formats}
        worst = max(errors, key=lambda f: errors[f])
        kl = _loss_of(sensitivity, unit, made[worst], loss)
        found[unit[0]] = {f: kl * (e / errors[worst] if errors[worst] else 0.0) for f, e in errors.items()}
    return found


def _measure_outside(
    step: Step, plans: Sequence[Plan], sensitivity: Sensitivity, loss: Callable[[], float]
) -> Losses:
    found: Losses = {}
    for name in matrix_names(step.graph)[1]:
        for plan in plans:
            if name in plan and spelled(plan[name]) not in found.setdefault(name, {}):
                made = {name: rounded(step, plan, name)}
                found[name][spelled(plan[name])] = _loss_of(sensitivity, (name,), made, loss)
    return found


def _error(
    block: BlockAt, hessians: Mapping[Site, Hessian], unit: Sequence[str], made: Mapping[str, list[Codes]]
) -> float:
    """Of the outputs of a unit's matrices: squared, summed over tokens."""
    total = 0.0
    for site, hessian in hessians.items():
        for name in set(site.matrices) & set(unit):
            weight = block.matrix(name, site.plane)
            error = weight - torch.from_numpy(made[name][site.plane or 0].floats())
            total += hessian.tokens * float(((error @ hessian.mean()) * error).sum())
    return total


def allocate(config: MixedBits, measured: Sequence[Measured]) -> list[str]:
    """The format of every unit. Raises ConfigError for a budget or a limit that cannot be met."""
    offers = [list(unit.candidates.values()) for unit in measured]
    total = sum(unit.weights for unit in measured)
    if config.max_kl is not None:
        chosen = least_bytes(offers, config.max_kl)
    elif config.max_bytes is not None:
        chosen = least_loss(offers, config.max_bytes)
    else:
        assert config.average_bits is not None
        least = sum(min(o.bytes for o in choice) for choice in offers) * 8 / total
        if config.average_bits < least:
            raise ConfigError(
                f"quantize.average_bits is {config.average_bits:g}, and the smallest of all candidates take "
                f"{math.ceil(least * 1000) / 1000:g} bits of a weight, scales included; raise it, or offer "
                "smaller candidates"
            )
        chosen = least_loss(offers, math.floor(config.average_bits * total / 8))
    return [list(unit.candidates)[i] for unit, i in zip(measured, chosen, strict=True)]


def sensitivity_record(
    step: Step, config: MixedBits, measured: Sequence[Measured], chosen: Sequence[str]
) -> dict[str, Any]:
    """What the result's `gossamer_sensitivity.json` holds: losses are mean KL divergences in nats per token
    with the unit's matrices alone in that format."""
    return {
        "version": 1,
        "model": step.source.content_key(),
        "text": hashlib.sha256(step.job.text.tobytes()).hexdigest(),
        "context": step.job.context,
        "windows": min(config.windows, step.job.samples),
        "method": config.method,
        "predicted_kl": sum(u.candidates[s].loss for u, s in zip(measured, chosen, strict=True)),
        "matrices": [
            {
                "names": unit.names,
                "weights": unit.weights,
                "chosen": stored,
                "candidates": {
                    name: {"bytes": offer.bytes, "kl": offer.loss} for name, offer in unit.candidates.items()
                },
            }
            for unit, stored in zip(measured, chosen, strict=True)
        ],
    }


def _loss_of(
    sensitivity: Sensitivity,
    unit: Sequence[str],
    made: Mapping[str, Sequence[Codes]],
    loss: Callable[[], float],
) -> float:
    weights = [sensitivity.model.weight(name) for name in unit]
    before = [weight.clone() for weight in weights]
    for name, weight in zip(unit, weights, strict=True):
        fill(weight, made[name])
    kl = loss()
    for weight, old in zip(weights, before, strict=True):
        weight.copy_(old)
    return kl


def _measured(
    graph: Graph, unit: tuple[str, ...], plans: Sequence[Plan], losses: Mapping[str, float]
) -> Measured:
    offers = {}
    for plan in plans:
        choice = plan[unit[0]]
        size = sum(stored_bytes(choice.format, choice.group, graph.weights[name].shape) for name in unit)
        offers[spelled(choice)] = Offer(bytes=size, loss=losses[spelled(choice)])
    weights = sum(math.prod(graph.weights[name].shape) for name in unit)
    return Measured(names=unit, weights=weights, candidates=offers)
