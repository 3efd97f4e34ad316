"""What all ways to quantize share: the model, which matrices become what, results of blocks, the directory.

A step makes codes of one matrix after the other, keeps each block's in the job's scratch directory, and
writes the model from there; what was not quantized is copied from the model before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gossamer.checkpoint.codes import CodedTensor, Codes
from gossamer.checkpoint.compressed_tensors import write_compressed_tensors
from gossamer.checkpoint.hub import read_config
from gossamer.checkpoint.model_writer import copy_beside, from_checkpoint
from gossamer.checkpoint.weights import ModelSource, gather, invert
from gossamer.compress.model import check_floats, open_model
from gossamer.compress.quantize.plan import Plan, matrix_names, summary
from gossamer.compress.results import BlockResults
from gossamer.compress.step import Job
from gossamer.graph.ir import Graph
from gossamer.graph.weights import Tensor, leaves

__all__ = ["OUTSIDE", "Step", "fill", "keep", "kept", "kept_scale", "open_step", "put_back", "write"]

SCALE = ".activation_scale"  # behind the name of a matrix in a block's results
FLOAT = "float."  # before the names of checkpoint tensors in a block's results
OUTSIDE = "outside"  # the scope of what belongs to no block: embedding and head


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A step's model, and where its results lie."""

    job: Job
    graph: Graph
    source: ModelSource
    results: BlockResults


def open_step(job: Job, doing: str = "quantization") -> Step:
    """The model of a job. Raises ConfigError for one that is quantized already, CheckpointError."""
    graph, source = open_model(job.model)
    check_floats(graph, doing)
    return Step(job=job, graph=graph, source=source, results=BlockResults(job.scratch))


def keep(
    step: Step,
    scope: str,
    codes: Mapping[str, Sequence[Codes]],
    floats: Mapping[str, Any] | None = None,
    scales: Mapping[str, float] | None = None,
) -> None:
    """Keeps what a block became. codes: of each plane of each matrix (one plane but for experts); floats:
    checkpoint tensors that changed, by name; scales: of the activations of matrices that have just one."""
    arrays = {f"{FLOAT}{name}": np.asarray(array) for name, array in (floats or {}).items()}
    arrays |= {f"{name}{SCALE}": np.asarray([scale], np.float32) for name, scale in (scales or {}).items()}
    for name, planes in codes.items():
        for part in ("codes", "scales", "zeros"):
            each = [getattr(plane, part) for plane in planes]
            if each[0] is not None:
                stacked = len(step.graph.weights[name].shape) == 3
                arrays[f"{name}.{part}"] = np.stack(each) if stacked else each[0]
    step.results.save(scope, arrays)


def kept(step: Step, scope: str, plan: Plan, name: str) -> list[Codes]:
    """The planes of a matrix as a block's results have them."""
    file = step.results.open(scope)
    shape = (1, *step.graph.weights[name].shape)[-3:]

    def planes(part: str) -> Sequence[Any]:
        if f"{name}.{part}" not in file.names():
            return [None] * shape[0]
        return list(file.read(f"{name}.{part}").reshape(shape[0], shape[1], -1))

    choice = plan[name]
    return [
        Codes(format=choice.format, group=choice.group, codes=codes, scales=scales, zeros=zeros)
        for codes, scales, zeros in zip(planes("codes"), planes("scales"), planes("zeros"), strict=True)
    ]


def kept_scale(step: Step, scope: str, name: str) -> float | None:
    """The scale of a matrix's activations as a block's results have it; None: every token has its own."""
    file = step.results.open(scope)
    return float(file.read(f"{name}{SCALE}")[0]) if f"{name}{SCALE}" in file.names() else None


def put_back(step: Step, scope: str, plan: Plan, name: str, weight: torch.Tensor) -> None:
    """Fills a matrix [N, K] or stack of them with the values that a block's results stand for."""
    fill(weight, kept(step, scope, plan, name))


def fill(weight: torch.Tensor, planes: Sequence[Codes]) -> None:
    """Fills a matrix [N, K] or a stack of them with the values of codes."""
    for plane, codes in zip(weight if weight.ndim == 3 else weight[None], planes, strict=True):
        plane.copy_(torch.from_numpy(codes.floats()))


def write(step: Step, plan: Plan) -> dict[str, Any]:
    """Fills the job's directory from the results of all blocks, and gives facts for the certificate."""
    job, graph = step.job, step.graph
    blocks, outside = matrix_names(graph)
    places = {name: scope for scope, names in blocks.items() for name in names}
    places |= dict.fromkeys(outside, OUTSIDE)
    coded: dict[str, CodedTensor] = {}
    for name, choice in plan.items():
        for leaf in leaves(graph.weights[name].expr):
            coded[leaf.name] = CodedTensor(
                format=choice.format,
                group=choice.group,
                shape=(leaf.shape[0], leaf.shape[1]),
                make=lambda leaf=leaf: tensor_codes(step, plan, places, leaf),  # type: ignore[misc]
                activation_scale=kept_scale(step, places[name], name),
            )
    floats: dict[str, Any] = dict(
        from_checkpoint(step.source, [n for n in step.source.names() if n not in coded])
    )
    for scope in (*blocks, OUTSIDE):
        file = step.results.open(scope)
        for key in file.names():
            if key.startswith(FLOAT):
                floats[key.removeprefix(FLOAT)] = file.read(key)
    total = write_compressed_tensors(job.out, read_config(job.model), floats, coded, graph=graph)
    copy_beside(job.model, job.out)
    return {**summary(graph, plan), "bytes": total}


def tensor_codes(step: Step, plan: Plan, places: Mapping[str, str], tensor: Tensor) -> Codes:
    """A whole checkpoint tensor's codes. places: matrix -> scope of the results that hold it."""
    weights = step.graph.weights
    readers = [n for n in plan if any(leaf.name == tensor.name for leaf in leaves(weights[n].expr))]
    found: dict[str, Any] = {}
    for part in ("codes", "scales", "zeros"):
        pieces = []
        for name in readers:
            planes = [getattr(codes, part) for codes in kept(step, places[name], plan, name)]
            if planes[0] is not None:
                array = planes[0] if len(weights[name].shape) == 2 else np.stack(planes)
                pieces += [p for p in invert(weights[name].expr, array) if p.tensor.name == tensor.name]
        found[part] = gather(iter(pieces))[tensor.name] if pieces else None
    choice = plan[readers[0]]
    return Codes(format=choice.format, group=choice.group, **found)
