"""How much the parts of a model matter, by activations (Muralidharan et al., Compact Language Models via
Pruning and Knowledge Distillation, 2024; layers by Men et al., ShortGPT, 2024) or by the first order of the
loss (Molchanov et al., Importance Estimation for Neural Network Pruning, 2019).

Axes: T tokens, H hidden, N outputs, K inputs, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn import functional as F

from gossamer.backends.reference import ReferenceModel
from gossamer.checkpoint.weights import WeightSource, evaluate
from gossamer.compress.blocks import Blocks
from gossamer.compress.prune.axes import layer_of, value_kinds, weight_kinds
from gossamer.compress.step import Ids, Job
from gossamer.errors import CheckpointError
from gossamer.graph.ir import Graph, Node
from gossamer.graph.ops import get_op
from gossamer.graph.ops.attention import KVState

__all__ = ["Importance", "by_activation", "by_taylor", "groups", "output_power"]


@dataclass(slots=True)
class Importance:
    """layers [layers], hidden [H]; parts: name of the matrix that reads heads or MLP channels -> [K] or
    [E, K], by Taylor alone (by activation they come of `output_power` as the model is cut). shares: name of
    a norm's weight -> the mean of x^2 / mean(x^2) for each of its inputs x [H]."""

    layers: torch.Tensor
    hidden: torch.Tensor
    parts: dict[str, torch.Tensor] = field(default_factory=dict)
    shares: dict[str, torch.Tensor] = field(default_factory=dict)


def by_activation(graph: Graph, source: WeightSource, windows_BL: Ids, job: Job) -> Importance:
    """Hidden columns by the root mean square of what norms make of them, summed over norms; layers by how
    far they turn the hidden state (1 - cosine of what goes in and comes out)."""
    kinds = value_kinds(graph)
    found = Importance(torch.zeros(graph.layers), torch.zeros(graph.hidden))
    walk = Blocks(graph, source, windows_BL)
    entered: torch.Tensor | None = None
    layer = -1
    for index, block in enumerate(walk):
        job.check_stop()
        job.progress("importance", index, len(walk))
        if (at := layer_of(block.scope)) != layer:
            name = _stream(block.block.inputs)
            now = torch.cat([block.values([name], rows)[name] for rows in walk.chunks()])
            if entered is not None:
                found.layers[layer] = _turned(entered, now)
            assert at is not None
            entered, layer = now, at
        for node in block.block.nodes:
            if node.op in ("rms_norm", "layer_norm") and kinds[node.inputs[0]] == "hidden":
                names = [node.inputs[0], node.outputs[0]]
                _add_norm(found, node, (block.values(names, rows) for rows in walk.chunks()))
    assert entered is not None
    found.layers[layer] = _turned(entered, walk.hidden)
    for node in graph.nodes:
        if not node.scope and node.op in ("rms_norm", "layer_norm"):
            weights = [torch.from_numpy(_floats(graph, source, name)) for name in node.weights]
            (out,) = get_op(node.op).reference(node.attrs, [walk.hidden], weights, KVState(()))
            _add_norm(found, node, iter([{node.inputs[0]: walk.hidden, node.outputs[0]: out}]))
    return found


def by_taylor(graph: Graph, source: WeightSource, windows_BL: Ids, job: Job) -> Importance:
    """What a factor in front of a part would change in the loss, to the first order: the sum of weight times
    gradient over the matrix that reads the part (over a norm's weight for a hidden column, over what writes
    into the hidden state for a layer), its size averaged over windows. One backward pass for each window;
    the whole model is in memory, twice."""
    model = ReferenceModel.load(graph, source)
    kinds = weight_kinds(graph)
    found = Importance(torch.zeros(graph.layers), torch.zeros(graph.hidden))
    for index, window in enumerate(windows_BL):
        job.check_stop()
        job.progress("gradients", index, len(windows_BL))
        ids = torch.from_numpy(window.astype(np.int64))[None]
        loss = F.cross_entropy(model.logits(ids)[0, :-1], ids[0, 1:])
        if not torch.isfinite(loss):
            raise CheckpointError(
                "the model's loss on the calibration text is NaN or infinite; the checkpoint is damaged"
            )
        model.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        layers = torch.zeros(graph.layers)
        for name, weight in model.named_parameters():
            if weight.grad is None:
                continue
            product = (weight * weight.grad).detach()
            if kinds[name] == ("hidden",) and _is_norm(graph, name):
                found.hidden += product.abs()
            elif kinds[name][-1] in ("heads", "ffn") and len(kinds[name]) > 1:
                columns = product.sum(-2)
                found.parts[name] = found.parts.get(name, torch.zeros(())) + columns.abs()
                layer = layer_of(name)
                assert layer is not None
                layers[layer] += columns.sum()
        found.layers += layers.abs()
    return found


def output_power(weight_NK: torch.Tensor, hessian_KK: torch.Tensor, size: int) -> torch.Tensor:
    """Of every group of `size` neighbouring inputs, the mean square of what it gives to the outputs
    [K / size]. hessian: the mean of x x^T of the inputs."""
    count = weight_NK.shape[1] // size
    weight = weight_NK.view(-1, count, size)
    blocks = hessian_KK.view(count, size, count, size).diagonal(dim1=0, dim2=2)
    return torch.einsum("ngi,ijg,ngj->g", weight, blocks, weight)


def groups(importance_K: torch.Tensor, size: int) -> torch.Tensor:
    """Summed over groups of `size` neighbours."""
    return importance_K.view(*importance_K.shape[:-1], -1, size).sum(-1)


def _stream(inputs: tuple[str, ...]) -> str:
    """The hidden state among a block's inputs."""
    return next(name for name in inputs if name not in ("ids", "positions", "rows"))


def _turned(before_TH: torch.Tensor, after_TH: torch.Tensor) -> torch.Tensor:
    return 1 - F.cosine_similarity(before_TH, after_TH, dim=-1).mean()


def _add_norm(found: Importance, node: Node, chunks: Iterator[dict[str, torch.Tensor]]) -> None:
    power, share, tokens = torch.zeros_like(found.hidden), torch.zeros_like(found.hidden), 0
    for chunk in chunks:
        before, after = chunk[node.inputs[0]] ** 2, chunk[node.outputs[0]] ** 2
        power += after.sum(0)
        share += (before / before.mean(-1, keepdim=True).clamp_min(1e-30)).sum(0)
        tokens += len(before)
    found.hidden += (power / tokens).sqrt()
    found.shares[node.weights[0]] = share / tokens


def _is_norm(graph: Graph, name: str) -> bool:
    return any(node.op in ("rms_norm", "layer_norm") and node.weights[0] == name for node in graph.nodes)


def _floats(
    graph: Graph, source: WeightSource, name: str
) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.array(evaluate(graph.weights[name].expr, source), np.float32)
