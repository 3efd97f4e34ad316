"""Keys and values whose channels are balanced, so that a KV cache in few bits loses less.

The cache gives every token and head one scale, which its largest channel sets: where channels differ, the
small ones are rounded away. Factors move them together, of keys into queries (as SmoothQuant balances
activations against weights; Xiao et al., 2023) and of values into the output projection, and cost nothing at
run time. How far is searched layer by layer, by the error of what attention gives under the cache's rounding;
a layer that gains nothing stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from gossamer.checkpoint.hub import read_config
from gossamer.checkpoint.model_writer import copy_beside, from_checkpoint, write_config, write_weights
from gossamer.compress.blocks import BlockAt, Blocks, walk_memory
from gossamer.compress.model import calibration
from gossamer.compress.quantize.life import FLOAT, Step, open_step
from gossamer.compress.quantize.moved import changed_floats, put_floats_back
from gossamer.compress.quantize.scaling import Scaling, scale, scalings
from gossamer.compress.step import Estimate, Job
from gossamer.config.compression import KVCalibration
from gossamer.graph.ir import Graph, Node

__all__ = ["balance_block", "candidates", "estimate", "run"]

_STRENGTHS = [i / 8 for i in range(1, 9)]
_ERROR = "error"  # among a block's results: before and after
_TOKENS = 2048  # by which strengths are judged
_GAIN = 0.99  # what a balance must bring the error down to, lest it fits the calibration text alone


def estimate(config: KVCalibration, graph: Graph, tokens: int, flops: float) -> Estimate:
    """See `StepRunner`. Attention's products of tokens with tokens are not counted."""
    linear = [n for n in graph.nodes if n.op == "linear" and n.scope]
    attention = {b.scope for b in graph.blocks() if any(n.op == "attention" for n in b.nodes)}
    everything = sum(math.prod(graph.weights[n.weights[0]].shape) for n in linear)
    tried = sum(math.prod(graph.weights[n.weights[0]].shape) for n in linear if n.scope in attention)
    judged = min(tokens, _TOKENS) * 2 * 2 * len(_STRENGTHS)
    return Estimate(
        seconds=1.5 * (2.0 * tokens * everything + 2.0 * judged * tried) / flops,
        memory=walk_memory(graph, tokens) + 24 * everything // max(1, graph.layers),
        disk=8 * tried,
    )


def run(config: KVCalibration, job: Job) -> dict[str, Any]:
    """See `StepRunner`. The result has the tensors of the model before, in their dtypes."""
    step = open_step(job, "calibration of the KV cache")
    walk = Blocks(step.graph, step.source, calibration(step.graph, job))
    for done, block in enumerate(walk):
        job.check_stop()
        job.progress("balancing keys and values", done, len(walk))
        if block.scope not in step.results:
            moved, before, after = balance_block(step.graph, block, config.format)
            floats = changed_floats(step, block, moved)
            errors = {_ERROR: np.asarray([before, after], np.float64)} if before else {}
            step.results.save(block.scope, {FLOAT + name: array for name, array in floats.items()} | errors)
        put_floats_back(step, block)
    job.progress("balancing keys and values", len(walk), len(walk))
    return {"method": "kv_calibration", "format": config.format} | _write(step)


@torch.no_grad()
def balance_block(graph: Graph, block: BlockAt, format: str) -> tuple[list[Scaling], float, float]:
    """Moves factors within a block's weights, in place; gives those moved, and the relative squared error of
    what attention gives under the cache's rounding, before and after (0, 0: no attention in it)."""
    node = next((n for n in block.block.nodes if n.op == "attention"), None)
    if node is None:
        return [], 0.0, 0.0
    windows = max(1, min(block.walk.batch, _TOKENS // block.walk.length))
    # Windows from all over the text: rows of whole windows lie one after the other.
    stride = block.walk.batch // windows
    length = block.walk.length
    rows = [slice(w * stride * length, (w * stride + 1) * length) for w in range(windows)]
    value = _output(block, node)
    exact = [block.taps(r, (value,))[value] for r in rows]

    def error() -> float:
        got = [block.taps(r, (value,), format)[value] for r in rows]
        off = sum(float((a - b).square().sum()) for a, b in zip(got, exact, strict=True))
        return off / max(sum(float(e.square().sum()) for e in exact), 1e-30)

    moved: list[Scaling] = []
    before = least = error()
    for scaling in scalings(graph, block.block):
        if scaling.kind not in ("key", "value"):
            continue
        x = torch.cat([block.taps(r, (scaling.value,))[scaling.value] for r in rows])
        names = {place.weight for place in (*scaling.divided, *scaling.multiplied)}
        old = {name: block.model.weight(name).detach().clone() for name in names}
        best = None
        for factors in candidates(x, scaling):
            scale(block.model, scaling, factors)
            found = error()
            if found < _GAIN * least and (best is None or found < best[0]):
                best = found, factors
            for name, weight in old.items():
                block.model.weight(name).data.copy_(weight)
        if best is not None:
            least = best[0]
            scale(block.model, scaling, best[1])
            moved.append(scaling)
    return moved, before, least


def candidates(x_TC: torch.Tensor, scaling: Scaling) -> Iterator[torch.Tensor]:
    """Factors to try: the root mean squares of channels, and their largest values, to several powers.

    x: what the scaling's value is on a text; channels of one factor count by the largest of them.
    """
    place = scaling.divided[0].factor
    index = torch.arange(scaling.size) if place is None else torch.tensor(place)
    index = index.repeat(x_TC.shape[1] // len(index))  # a norm's weight is that of all heads
    for size_C in (x_TC.square().mean(0).sqrt(), x_TC.abs().amax(0)):
        size_F = torch.zeros(scaling.size).scatter_reduce(0, index, size_C, "amax")
        size_F = size_F.clamp(min=max(1e-4 * float(size_F.max()), 1e-30))
        for strength in _STRENGTHS:
            factors_F = size_F**strength
            yield factors_F / (factors_F.max() * factors_F.min()).sqrt()


def _output(block: BlockAt, node: Node) -> str:
    """What the output projection gives; what attention gives where nothing else reads it alone."""
    heads = node.outputs[0]
    readers = [n for n in block.block.nodes if heads in n.inputs]
    return readers[0].outputs[0] if [n.op for n in readers] == ["linear"] else heads


def _write(step: Step) -> dict[str, Any]:
    job = step.job
    tensors: dict[str, Any] = dict(from_checkpoint(step.source))
    errors: dict[str, dict[str, float]] = {}
    changed = 0
    for block in step.graph.blocks():
        file = step.results.open(block.scope)
        for name in file.names():
            if name.startswith(FLOAT):
                tensors[name.removeprefix(FLOAT)] = file.read(name)
                changed += 1
            else:
                before, after = file.read(name).tolist()
                errors[block.scope] = {"before": round(before, 8), "after": round(after, 8)}
    total = write_weights(job.out, tensors)
    write_config(job.out, read_config(job.model))
    copy_beside(job.model, job.out)
    return {"attention_error": errors, "changed_tensors": changed, "bytes": total}
