"""The life cycle of pruning single weights: block by block, each with inputs that the pruned blocks before it
give, and a matrix within it with inputs that the pruned matrices before it give.

Values are rounded to the checkpoint's dtype as soon as a block is done, so that what follows sees what will
be loaded; hence a run that goes on from finished blocks ends with the same bits.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gossamer.checkpoint.model_writer import copy_beside, write_weights
from gossamer.checkpoint.safetensors import DTYPES
from gossamer.checkpoint.weights import ModelSource, evaluate
from gossamer.compress.blocks import BlockAt, Blocks, walk_memory
from gossamer.compress.hessian import Hessian, collect
from gossamer.compress.model import calibration, check_floats, open_model
from gossamer.compress.prune.changed import Changed
from gossamer.compress.results import BlockResults
from gossamer.compress.step import Estimate, Job
from gossamer.config import EngineConfig
from gossamer.errors import CheckpointError, ConfigError
from gossamer.graph.ir import Graph
from gossamer.graph.weights import leaves
from gossamer.passes.weight_formats import plan_formats

__all__ = ["Prune", "estimate_pruning", "prune_weights", "skipped_matrices"]

Prune = Callable[[list[torch.Tensor], Hessian], list[torch.Tensor]]
"""Pruned copies of matrices [N, K] that read the same inputs, whose second moments the Hessian holds."""


def estimate_pruning(
    graph: Graph, tokens: int, flops: float, per_weight: Callable[[int], float], moments: bool
) -> Estimate:
    """Three passes for the inputs of each block's matrices and one for its outputs. per_weight: flops of the
    algorithm for each weight of a matrix of K inputs; moments: whether whole Hessians are made use of."""
    work, largest = 0.0, 0
    total = 0
    for block in graph.blocks():
        weights = [graph.weights[name] for name in {w for node in block.nodes for w in node.weights}]
        matrices = [w.shape for w in weights if len(w.shape) > 1]
        size = sum(int(np.prod(shape)) for shape in matrices)
        squares = sum(shape[-1] ** 2 for shape in {(*s[:-2], s[-1]) for s in matrices})
        work += 2.0 * size * tokens * 4 + sum(np.prod(s) * per_weight(s[-1]) for s in matrices)
        work += squares * 2.0 * tokens + (2.0 * sum(s[-1] ** 3 for s in matrices) if moments else 0.0)
        total, largest = total + size, max(largest, 4 * (3 * size + 3 * squares))
    seconds = work / flops + 5e-9 * total
    return Estimate(seconds=seconds, memory=largest + walk_memory(graph, tokens), disk=4 * total)


def prune_weights(
    skip: Collection[str], job: Job, prune: Prune, *, calibrated: bool = True
) -> dict[str, Any]:
    """Runs a step. skip: patterns over names that stay whole; calibrated: whether `prune` looks at the
    Hessian (else it is given an empty one).

    Gives {"sparsity": of all matrices that were pruned, "matrices": {name: share of zeros}, "unreached":
    experts that no calibration token reached, whose weights count by their size alone}.
    Raises ConfigError for a quantized model, a pattern that matches nothing, or too little text;
    CheckpointError for weights that are NaN; Stopped.
    """
    graph, checkpoint = open_model(job.model)
    check_floats(graph, "pruning")
    skipped = skipped_matrices(graph, skip)
    # Without calibration the walk needs a token all the same, and nothing depends on it.
    windows = calibration(graph, job) if calibrated else np.zeros((1, 1), np.int32)
    source = Changed(checkpoint, BlockResults(job.scratch))
    walk = Blocks(graph, source, windows)
    zeros: dict[str, float] = {}
    unreached: list[str] = []
    for index, block in enumerate(walk):
        job.check_stop()
        job.progress("pruning", index, len(walk))
        names = _matrices(block, skipped)
        if names and block.scope not in source.results:
            unreached += _prune_block(block, skipped, prune, calibrated)
            source.save(block.scope, _changed(block, names, checkpoint))
        for name in names:
            stored = evaluate(graph.weights[name].expr, source)
            block.matrix(name)[...] = torch.from_numpy(stored.astype(np.float32))
            zeros[name] = 1 - np.count_nonzero(stored) / stored.size
    if not zeros:
        raise ConfigError("prune.skip names every matrix; leave some to prune")
    write_weights(job.out, source.tensors())
    shutil.copyfile(job.model / "config.json", job.out / "config.json")
    copy_beside(job.model, job.out)
    job.progress("pruning", len(walk), len(walk))
    sizes = {name: int(np.prod(graph.weights[name].shape)) for name in zeros}
    overall = sum(zeros[name] * size for name, size in sizes.items()) / sum(sizes.values())
    return {"sparsity": overall, "matrices": zeros, "unreached": unreached}


def skipped_matrices(graph: Graph, patterns: Collection[str]) -> set[str]:
    """Matrices that stay whole. Raises ConfigError for a pattern that matches none."""
    rules = tuple((pattern, "f32") for pattern in patterns)
    plan = plan_formats(graph, EngineConfig(model=graph.name, weight_formats=rules, mixed_precision=None))
    return {choice.weight for choice in plan if choice.rule.startswith("pattern ")}


def _matrices(block: BlockAt, skipped: Collection[str]) -> list[str]:
    names = dict.fromkeys(name for site in block.sites() for name in site.matrices)
    return [name for name in names if name not in skipped]


def _prune_block(block: BlockAt, skipped: Collection[str], prune: Prune, calibrated: bool) -> list[str]:
    """Prunes in place; gives the matrices of experts that no token reached."""
    unreached = []
    for value in dict.fromkeys(site.value for site in block.sites()):
        if calibrated:
            moments = collect(block, value)
        else:
            moments = {site: Hessian(0) for site in block.sites() if site.value == value}
        for site, hessian in moments.items():
            names = [name for name in site.matrices if name not in skipped]
            if not names:
                continue
            if calibrated and not hessian.tokens:
                unreached += [f"{name}[{site.plane}]" for name in names]
            matrices = [block.matrix(name, site.plane) for name in names]
            for matrix, pruned in zip(matrices, prune(matrices, hessian), strict=True):
                matrix[...] = pruned
    return unreached


def _changed(block: BlockAt, names: list[str], checkpoint: ModelSource) -> dict[str, npt.NDArray[Any]]:
    """The tensors that the matrices come of, in the checkpoint's dtype; zeros stay zeros."""
    graph = block.walk.graph
    changed = {leaf.name for name in names for leaf in leaves(graph.weights[name].expr)}
    arrays = {}
    for name, array in block.tensors().items():
        if name in changed:
            arrays[name] = array.astype(DTYPES[checkpoint.info(name).dtype])
            if not np.isfinite(arrays[name].astype(np.float32)).all():
                raise CheckpointError(
                    f"tensor {name} overflows {arrays[name].dtype} after pruning; raise the damping, "
                    "or calibrate on more text"
                )
    return arrays
