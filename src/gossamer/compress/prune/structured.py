"""The life cycle of pruning whole parts: a smaller model of the same architecture.

Layers and hidden columns go first, everywhere alike; then, block by block with what the pruned blocks before
it give, heads and MLP channels, whose readers take over what they can of what went (least squares on the
calibration text). A new config.json makes the new graph, and old weights, cut along the axes that
`axes.weight_kinds` names, are written back through the new graph's expressions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gossamer.backends.reference import ReferenceModel
from gossamer.checkpoint.hub import read_config
from gossamer.checkpoint.model_writer import (
    copy_beside,
    from_checkpoint,
    write_config,
    write_json,
    write_weights,
)
from gossamer.checkpoint.safetensors import DTYPES, Checkpoint
from gossamer.checkpoint.safetensors_writer import LazyTensor
from gossamer.checkpoint.weights import ModelSource, Part, evaluate, gather, invert
from gossamer.compress.blocks import Blocks, walk_memory
from gossamer.compress.model import calibration, check_floats, open_model
from gossamer.compress.prune.axes import Kept, cut, layer_of, weight_kinds
from gossamer.compress.prune.changed import Changed
from gossamer.compress.prune.importance import by_activation, by_taylor
from gossamer.compress.prune.parts import choose_parts, largest
from gossamer.compress.prune.shape import Counts, check_alike, counts_left, counts_of, smaller_config
from gossamer.compress.results import BlockResults
from gossamer.compress.step import Estimate, Ids, Job
from gossamer.config.compression import Structured
from gossamer.errors import CheckpointError
from gossamer.graph.families import build_graph
from gossamer.graph.families.names import fit_names
from gossamer.graph.ir import Graph, Node
from gossamer.graph.part import part
from gossamer.graph.weights import Constant, leaves

__all__ = ["estimate", "run"]

Array = npt.NDArray[Any]
_OUTER = "outer"  # the result of what stands in no block


def estimate(config: Structured, graph: Graph, tokens: int, flops: float) -> Estimate:
    """Four passes block by block (Taylor: gradients of the whole model as well)."""
    sizes = [int(np.prod(w.shape)) for w in graph.weights.values() if len(w.shape) > 1]
    widest = max(
        sum(int(np.prod(graph.weights[name].shape)) for name in names) for names in _pieces(graph).values()
    )
    taylor = config.importance == "taylor"
    squares = sum(w.shape[-1] ** 2 for w in graph.weights.values() if len(w.shape) > 1)
    seconds = (2.0 * sum(sizes) * tokens * (10 if taylor else 4) + 2.0 * squares * tokens) / flops
    memory = walk_memory(graph, tokens) + 12 * widest + (8 * sum(sizes) if taylor else 0)
    return Estimate(seconds=seconds, memory=memory, disk=8 * sum(sizes))


def run(config: Structured, job: Job) -> dict[str, Any]:
    """Gives {"parameters": [before, after], "layers": those that stay, "shape": {what: [before, after]}}.

    Raises ConfigError for a quantized model, shares that leave or take nothing, or too little text;
    UnsupportedModelError for an architecture that cannot have a part smaller; CheckpointError for weights
    that are NaN; Stopped.
    """
    graph, checkpoint = open_model(job.model)
    check_floats(graph, "pruning")
    old = counts_of(graph)
    left = counts_left(config, old)
    raw = read_config(job.model)
    # What the architecture refuses is refused before any work.
    smaller_config(raw, graph, left, range(left.layers))
    windows = calibration(graph, job)
    chosen = _choose(config, graph, checkpoint, windows, left, job)
    layers = [int(layer) for layer in chosen["layers"]]
    narrow = replace(old, layers=left.layers, hidden=left.hidden)
    between, source = graph, checkpoint
    if narrow != old:
        config_between = smaller_config(raw, graph, narrow, layers)
        directory = job.scratch / "narrow"
        between = fit_names(build_graph(config_between, name=str(directory)), checkpoint.names())
        check_alike(graph, between, layers)
        if not (directory / "config.json").exists():
            directory.mkdir(exist_ok=True)
            write_weights(directory, _narrow(graph, checkpoint, between, chosen, job))
            write_config(directory, config_between)
        source = Checkpoint(directory)
    config_new = smaller_config(raw, graph, left, layers)
    new = fit_names(build_graph(config_new, name=str(job.out)), checkpoint.names())
    if left == narrow:
        tensors = from_checkpoint(source)
    else:
        tensors = _thin(between, source, new, left, chosen, windows, job)
    write_weights(job.out, tensors)
    write_config(job.out, config_new)
    copy_beside(job.model, job.out)
    return {
        "parameters": [_parameters(graph), _parameters(new)],
        "layers": layers,
        "shape": {n: [getattr(old, n), getattr(left, n)] for n in (f.name for f in fields(Counts))},
    }


def _choose(
    config: Structured, graph: Graph, source: ModelSource, windows: Ids, left: Counts, job: Job
) -> dict[str, Any]:
    """Which layers and hidden columns stay, and what norms and Taylor say; kept in the scratch directory."""
    path = job.scratch / "chosen.json"
    if path.exists():
        return dict(json.loads(path.read_text()))
    whole = left.layers == graph.layers and left.hidden == graph.hidden
    chosen: dict[str, Any] = {
        "layers": list(range(graph.layers)), "hidden": None, "parts": {}, "scales": {}
    }  # fmt: skip
    if config.importance == "taylor" or not whole:
        found = (by_taylor if config.importance == "taylor" else by_activation)(graph, source, windows, job)
        layers = largest(found.layers, left.layers).tolist()
        chosen["layers"] = layers
        chosen["parts"] = {
            _moved(name, layers): values.tolist()
            for name, values in found.parts.items()
            if layer_of(name) in layers
        }
        if left.hidden != graph.hidden:
            hidden = largest(found.hidden, left.hidden)
            chosen["hidden"] = hidden.tolist()
            if not found.shares:
                found.shares = by_activation(graph, source, windows, job).shares
            chosen["scales"] = {
                name: float(share[torch.from_numpy(hidden)].mean().sqrt())
                for name, share in found.shares.items()
            }
    write_json(path, chosen)
    return chosen


def _narrow(
    graph: Graph, source: ModelSource, new: Graph, chosen: Mapping[str, Any], job: Job
) -> dict[str, LazyTensor]:
    """The tensors with fewer layers and hidden columns."""
    results = _results(job, "narrow-blocks")
    layers, factors = list(chosen["layers"]), _factors(graph, new, chosen["scales"])
    kept = {} if chosen["hidden"] is None else {"hidden": np.asarray(chosen["hidden"], np.int64)}
    for index, (scope, names) in enumerate(_pieces(graph).items()):
        layer = layer_of(scope)
        if (layer is not None and layer not in layers) or _moved(scope, layers) in results:
            continue
        job.check_stop()
        job.progress("narrowing", index, graph.layers)
        arrays = {}
        for name in names:
            array = np.asarray(evaluate(graph.weights[name].expr, source), np.float32)
            arrays[name] = array * np.float32(factors.get(name, 1.0))
        _save(results, scope, graph, new, layers, arrays, kept, source)
    return _written(new, results)


def _factors(graph: Graph, new: Graph, scales: Mapping[str, float]) -> dict[str, float]:
    """What weights are multiplied with: norms, since the columns that stay have another mean square than all
    had; embeddings, where the family scales them by the width, and then the norm before a tied head."""
    factors = dict(scales)
    for before, after in zip(_embeds(graph), _embeds(new), strict=True):
        ratio = before.attrs["scale"] / after.attrs["scale"]
        if ratio != 1:
            (table,) = before.weights
            factors[table] = ratio
            for node in graph.nodes:
                if node.op == "linear" and node.weights[0] == table:
                    norm = graph.producers()[node.inputs[0]].weights[0]
                    factors[norm] = factors.get(norm, 1.0) / ratio
    return factors


def _embeds(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if node.op == "embed"]


def _thin(
    graph: Graph,
    source: ModelSource,
    new: Graph,
    left: Counts,
    chosen: Mapping[str, Any],
    windows: Ids,
    job: Job,
) -> dict[str, LazyTensor]:
    """The tensors with fewer heads and MLP channels; what a block gives to the next is what it will give."""
    results = _results(job, "thin-blocks")
    same = list(range(graph.layers))
    pieces, blocks = _pieces(graph), {block.scope: block for block in new.blocks()}
    if _OUTER not in results:
        outer = {name: np.asarray(evaluate(graph.weights[name].expr, source)) for name in pieces[_OUTER]}
        _save(results, _OUTER, graph, new, same, outer, {}, source)
    walk = Blocks(graph, source, windows)
    for index, block in enumerate(walk):
        job.check_stop()
        job.progress("pruning", index, len(walk))
        if block.scope not in results:
            given = {name: torch.tensor(values) for name, values in chosen["parts"].items()}
            kept = choose_parts(block, left, given)
            arrays = {name: block.model.weight(name).detach().numpy() for name in pieces[block.scope]}
            _save(results, block.scope, graph, new, same, arrays, kept, source)
        after = part(new, blocks[block.scope].nodes, {"out": blocks[block.scope].outputs[0]})
        block.model = ReferenceModel.load(after, Changed(source, results))
    return _written(new, results)


def _pieces(graph: Graph) -> dict[str, list[str]]:
    """Blocks, and what stands in none of them, with their weights in the checkpoint."""
    pieces: dict[str, list[str]] = {_OUTER: []}
    inside: dict[str, None] = {}
    for block in graph.blocks():
        names = dict.fromkeys(name for node in block.nodes for name in node.weights)
        inside |= names
        pieces[block.scope] = list(names)
    pieces[_OUTER] = [name for name in graph.weights if name not in inside]
    stored = {name for name, weight in graph.weights.items() if not isinstance(weight.expr, Constant)}
    return {scope: [name for name in names if name in stored] for scope, names in pieces.items()}


def _moved(name: str, layers: list[int]) -> str:
    """A scope or a weight's name with its layer's new number."""
    layer = layer_of(name)
    return name if layer is None else f"layers.{layers.index(layer)}.{name.split('.', 2)[2]}"


def _save(
    results: BlockResults,
    scope: str,
    graph: Graph,
    new: Graph,
    layers: list[int],
    arrays: Mapping[str, Array],
    kept: Kept,
    source: ModelSource,
) -> None:
    """Weights of the old graph, cut, as tensors of the new one."""
    kinds = weight_kinds(graph)
    parts: list[Part] = []
    dtypes: dict[str, str] = {}
    for name, array in arrays.items():
        expr = new.weights[_moved(name, layers)].expr
        parts += invert(expr, cut(array, kinds[name], kept))
        for before, after in zip(leaves(graph.weights[name].expr), leaves(expr), strict=True):
            dtypes[after.name] = source.info(before.name).dtype
    tensors = {}
    for name, array in gather(iter(parts)).items():
        tensors[name] = array.astype(DTYPES[dtypes[name]])
        if not np.isfinite(tensors[name].astype(np.float32)).all():
            raise CheckpointError(
                f"tensor {name} would hold NaN or infinity; the checkpoint is damaged, or its {dtypes[name]} "
                "is too narrow: convert it to BF16 or F32"
            )
    results.save(_moved(scope, layers), tensors)


def _written(new: Graph, results: BlockResults) -> dict[str, LazyTensor]:
    """What the results hold, in the graph's order."""
    found: dict[str, LazyTensor] = {}
    for scope in results.scopes():
        file = results.open(scope)
        for name in file.names():
            info = file.info(name)
            found[name] = LazyTensor(info.dtype, info.shape, partial(file.read, name))
    wanted = dict.fromkeys(leaf.name for weight in new.weights.values() for leaf in leaves(weight.expr))
    return {name: found[name] for name in wanted}


def _results(job: Job, name: str) -> BlockResults:
    directory = job.scratch / name
    directory.mkdir(exist_ok=True)
    return BlockResults(directory)


def _parameters(graph: Graph) -> int:
    """Numbers in the checkpoint, a tied one once."""
    shapes = {leaf.name: leaf.shape for w in graph.weights.values() for leaf in leaves(w.expr)}
    return sum(int(np.prod(shape)) for shape in shapes.values())
