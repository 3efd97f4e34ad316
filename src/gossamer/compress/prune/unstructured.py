"""The life cycle of pruning single weights: block by block, each with inputs that the pruned blocks before it
give, and a matrix within it with inputs that the pruned matrices before it give.

Values are rounded to the checkpoint's dtype as soon as a block is done, so that what follows sees what will
be loaded; hence a run that goes on from finished blocks ends with the same bits.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gossamer.checkpoint.model_writer import copy_beside, write_weights
from gossamer.checkpoint.safetensors import DTYPES
from gossamer.checkpoint.weights import ModelSource, evaluate
from gossamer.compress.blocks import BlockAt, Blocks, Site
from gossamer.compress.hessian import Hessian, collect, damped, inverse_cholesky
from gossamer.compress.model import calibration, check_floats, open_model
from gossamer.compress.prune.changed import Changed
from gossamer.compress.prune.magnitude import magnitude
from gossamer.compress.prune.sparsegpt import refine, sparsegpt
from gossamer.compress.prune.wanda import wanda
from gossamer.compress.results import BlockResults
from gossamer.compress.step import Estimate, Job
from gossamer.config import EngineConfig
from gossamer.config.compression import Magnitude, SparseGPT, Wanda
from gossamer.config.compression.prune import parse_pattern
from gossamer.errors import CheckpointError, ConfigError
from gossamer.graph.ir import Graph
from gossamer.graph.weights import leaves
from gossamer.passes.weight_formats import plan_formats

__all__ = ["estimate", "run"]

Config = Magnitude | Wanda | SparseGPT


def estimate(config: Config, graph: Graph, tokens: int, flops: float) -> Estimate:
    """Two passes for the inputs of each block's matrices and one for its outputs, and the algorithm's own."""
    widths: dict[str, set[int]] = {}
    sizes: dict[str, int] = {}
    work = 0.0
    tokens = 0 if isinstance(config, Magnitude) else tokens
    for name, weight in graph.weights.items():
        if len(weight.shape) < 2:
            continue
        scope, size = ".".join(name.split(".")[:3]), int(np.prod(weight.shape))
        sizes[scope] = sizes.get(scope, 0) + size
        if isinstance(config, SparseGPT):
            k = weight.shape[-1]
            work += size * k + (0 if k in widths.get(scope, set()) else 2.0 * k**2 * tokens + k**3)
            widths.setdefault(scope, set()).add(k)
        work += 6.0 * size * tokens
    blocks = [size for scope, size in sizes.items() if scope.startswith("layers.")]
    moments = 4 * max((sum(k**2 for k in ks) for ks in widths.values()), default=0)
    memory = 4 * (2 * tokens * graph.hidden + 3 * max(blocks)) + 4 * moments
    return Estimate(seconds=work / flops + 1e-8 * sum(blocks), memory=memory, disk=4 * sum(blocks))


def run(config: Config, job: Job) -> dict[str, Any]:
    """Gives {"sparsity": of all matrices that were pruned, "matrices": {name: share of zeros}, "unreached":
    experts that no calibration token reached, whose weights count by their size alone}.

    Raises ConfigError for a quantized model, a pattern in `skip` that matches nothing, or too little text;
    CheckpointError for weights that are NaN; Stopped.
    """
    graph, checkpoint = open_model(job.model)
    check_floats(graph, "pruning")
    skipped = _skipped(graph, config.skip)
    # Magnitude's walk needs a token too, and nothing depends on it.
    windows = np.zeros((1, 1), np.int32) if isinstance(config, Magnitude) else calibration(graph, job)
    source = Changed(checkpoint, BlockResults(job.scratch))
    walk = Blocks(graph, source, windows)
    zeros: dict[str, float] = {}
    unreached: list[str] = []
    for index, block in enumerate(walk):
        job.check_stop()
        job.progress("pruning", index, len(walk))
        names = _matrices(block, skipped)
        if names and block.scope not in source.results:
            unreached += _prune_block(config, block, skipped)
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


def _skipped(graph: Graph, patterns: Collection[str]) -> set[str]:
    """Matrices that stay whole. Raises ConfigError for a pattern that matches none."""
    rules = tuple((pattern, "f32") for pattern in patterns)
    plan = plan_formats(graph, EngineConfig(model=graph.name, weight_formats=rules, mixed_precision=None))
    return {choice.weight for choice in plan if choice.rule.startswith("pattern ")}


def _matrices(block: BlockAt, skipped: Collection[str]) -> list[str]:
    names = dict.fromkeys(name for site in block.sites() for name in site.matrices)
    return [name for name in names if name not in skipped]


def _prune_block(config: Config, block: BlockAt, skipped: Collection[str]) -> list[str]:
    """Prunes in place; gives the matrices of experts that no token reached."""
    unreached = []
    for value in dict.fromkeys(site.value for site in block.sites()):
        if isinstance(config, Magnitude):
            moments = {site: Hessian(0) for site in block.sites() if site.value == value}
        else:
            moments = collect(block, value)
        for site, hessian in moments.items():
            todo = [name for name in site.matrices if name not in skipped]
            if not todo:
                continue
            if site.plane is not None and not hessian.tokens and not isinstance(config, Magnitude):
                unreached += [f"{name}[{site.plane}]" for name in todo]
            _prune_site(config, block, site, todo, hessian)
    return unreached


def _prune_site(config: Config, block: BlockAt, site: Site, names: list[str], hessian: Hessian) -> None:
    pattern = None if config.pattern is None else parse_pattern(config.pattern)
    matrices = [block.matrix(name, site.plane) for name in names]
    if isinstance(config, SparseGPT):
        moments = hessian.mean()
        inverse = inverse_cholesky(moments, config.damping)
        moments = damped(moments, config.damping)
        for matrix in matrices:
            sparse = sparsegpt(matrix, inverse, config.sparsity, pattern, block=config.block)
            matrix[...] = refine(matrix, sparse, moments, config.refine)
    elif isinstance(config, Wanda):
        norms = hessian.mean().diagonal().sqrt() if hessian.tokens else torch.ones(matrices[0].shape[1])
        for matrix in matrices:
            matrix[...] = wanda(matrix, norms, config.sparsity, pattern)
    else:
        for matrix in matrices:
            matrix[...] = magnitude(matrix, config.sparsity, pattern)


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
