"""A model walked block by block: one block's weights in memory, and the hidden states between.

    for block in Blocks(graph, source, windows):
        block.inputs(observe)      # what every matrix of the block is multiplied with
        ...                        # change block.matrix(...) and block.model's other weights in place
        # going on computes the block's outputs with the changed weights: the next one's inputs

Attention and MLP are blocks of their own (`Graph.blocks()`), so that an MLP already sees what the attention
before it became. Axes: T tokens of a chunk, N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gossamer.backends.reference import ReferenceModel
from gossamer.checkpoint.weights import WeightSource, gather, invert
from gossamer.errors import CheckpointError
from gossamer.graph.ir import Block, Graph, Node
from gossamer.graph.ops.attention import KVState, SpanRows
from gossamer.graph.ops.elementwise import activate
from gossamer.graph.part import part
from gossamer.graph.weights import Constant, leaves

__all__ = ["BlockAt", "Blocks", "Site", "walk_memory"]

Observe = Callable[["Site", torch.Tensor], None]
_CHUNK_TOKENS = 4096


def walk_memory(graph: Graph, tokens: int) -> int:
    """Bytes of a walk over so many tokens beside the weights, roughly: torch itself, hidden states (old, new
    and being joined), and a chunk's attention scores for windows as long as the model takes, at most 2048."""
    heads = max((node.attrs["heads"] for node in graph.nodes if node.op == "attention"), default=1)
    scores = 12 * heads * min(tokens, _CHUNK_TOKENS) * min(graph.max_positions, 2048)
    return (600 << 20) + 12 * tokens * graph.hidden + scores


@dataclass(frozen=True, slots=True)
class Site:
    """A value that matrices are multiplied with. matrices: names of all that read it; plane: which of a stack
    of experts, None elsewhere."""

    value: str
    matrices: tuple[str, ...]
    plane: int | None = None


class Blocks:
    """The blocks of a graph in order, each with the hidden states that reach it.

    Holds the hidden states of all windows [B, L] between two blocks, float32; weights are float32 and gone
    with their block. Iterating yields a `BlockAt`; when the caller comes back for the next, the block's
    outputs are computed with whatever its weights are by then.
    """

    def __init__(self, graph: Graph, source: WeightSource, windows_BL: npt.NDArray[np.int32]) -> None:
        """Raises CheckpointError for weights that cannot be read."""
        self.graph, self.source = graph, source
        self.batch, self.length = windows_BL.shape
        self._ids = torch.from_numpy(windows_BL.astype(np.int64)).flatten()
        self._blocks = list(graph.blocks())

    def __len__(self) -> int:
        return len(self._blocks)

    @torch.no_grad()
    def __iter__(self) -> Iterator[BlockAt]:
        before = [node for node in self.graph.nodes[: self._first()] if not node.scope]
        values: dict[str, torch.Tensor] = {}
        wanted = self._blocks[0].inputs[0]
        embedding = self._load(before, wanted)
        values[wanted] = torch.cat(
            [self.run(embedding, {}, rows, (wanted,))[wanted] for rows in self.chunks()]
        )
        for index, block in enumerate(self._blocks):
            at = BlockAt(self, block, self._load(block.nodes, block.outputs[0]), values)
            yield at
            outputs = [at.outputs(rows) for rows in self.chunks()]
            for name in block.outputs:
                values[name] = torch.cat([out[name] for out in outputs])
            needed = {v for later in self._blocks[index + 1 :] for v in later.inputs}
            for name in set(values) - needed - set(block.outputs):
                del values[name]
        self.hidden = values[self._blocks[-1].outputs[0]]

    hidden: torch.Tensor
    """After a walk: what the last block gave [B * L, H], for the final norm and the head."""

    def chunks(self) -> Iterator[slice]:
        """Rows [B * L] in whole windows, few enough at a time to bound memory."""
        step = max(1, _CHUNK_TOKENS // self.length) * self.length
        for start in range(0, self.batch * self.length, step):
            yield slice(start, min(start + step, self.batch * self.length))

    def run(
        self,
        model: ReferenceModel,
        values: dict[str, torch.Tensor],
        rows: slice,
        outputs: tuple[str, ...],
        kv: str = "f32",
    ) -> dict[str, torch.Tensor]:
        """A part of the graph over some rows. kv: what keys and values are stored in (`round_kv`)."""
        count = rows.stop - rows.start
        spans = tuple(SpanRows(b, b * self.length, self.length, 0) for b in range(count // self.length))
        positions = torch.arange(count) % self.length
        given = {name: value[rows] for name, value in values.items() if name in model.graph.inputs}
        out: dict[str, torch.Tensor] = model(
            self._ids[rows], positions, torch.arange(count), KVState(spans, format=kv), outputs, given
        )
        return out

    def _first(self) -> int:
        return next(i for i, node in enumerate(self.graph.nodes) if node.scope)

    def _load(self, nodes: list[Node] | tuple[Node, ...], output: str) -> ReferenceModel:
        graph = part(self.graph, nodes, {output: output})
        model = ReferenceModel.load(graph, self.source).requires_grad_(False)
        for name, parameter in model.named_parameters():
            if not torch.isfinite(parameter).all():
                tensors = ", ".join(leaf.name for leaf in leaves(graph.weights[name].expr))
                raise CheckpointError(f"tensor {tensors} holds NaN or infinity; the checkpoint is damaged")
            for leaf in leaves(graph.weights[name].expr):
                self.source.release(leaf.name)
        return model


class BlockAt:
    """One block of a walk. model: the block's weights under the graph's names, float32, which may be
    changed in place."""

    def __init__(
        self, walk: Blocks, block: Block, model: ReferenceModel, values: dict[str, torch.Tensor]
    ) -> None:
        self.walk, self.block, self.model = walk, block, model
        self.scope = block.scope
        self._values = values

    def sites(self) -> tuple[Site, ...]:
        """Every value that the block's matrices read, routers' included (their matrices are left out)."""
        found: dict[str, list[str]] = {}
        routed: list[Site] = []
        logits = {n.inputs[0] for n in self.block.nodes if n.op == "top_k_experts"}
        for node in self.block.nodes:
            if node.op == "linear" and node.outputs[0] not in logits:
                found.setdefault(node.inputs[0], []).append(node.weights[0])
            elif node.op == "experts":
                gate, up, down = node.weights
                for plane in range(self.walk.graph.weights[gate].shape[0]):
                    routed.append(Site(node.inputs[0], (gate, up), plane))
                    routed.append(Site(f"{node.outputs[0]}.gated", (down,), plane))
        return (*(Site(value, tuple(dict.fromkeys(names))) for value, names in found.items()), *routed)

    def matrix(self, name: str, plane: int | None = None) -> torch.Tensor:
        """A matrix [N, K], to be changed in place."""
        whole = self.model.weight(name)
        return whole if plane is None else whole[plane]

    @torch.no_grad()
    def inputs(self, observe: Observe) -> None:
        """Hands every site what reaches it, chunk by chunk [T, K]; of an expert the tokens routed to it."""
        sites = self.sites()
        plain = {site.value: site for site in sites if site.plane is None}
        experts = [node for node in self.block.nodes if node.op == "experts"]
        taps = dict.fromkeys([*plain, *(v for node in experts for v in node.inputs)])
        given = {name for name in taps if name not in self.walk.graph.values or name in self._values}
        for rows in self.walk.chunks():
            wanted = tuple(name for name in taps if name not in given)
            out = self.walk.run(self.model, self._values, rows, wanted) if wanted else {}
            out |= {name: self._values[name][rows] for name in given}
            for value, site in plain.items():
                observe(site, out[value])
            for node in experts:
                self._observe_experts(node, out, observe)

    def _observe_experts(self, node: Node, out: dict[str, torch.Tensor], observe: Observe) -> None:
        x, ids = out[node.inputs[0]], out[node.inputs[1]]
        gate, up, down = node.weights
        for plane in torch.unique(ids).tolist():
            rows = x[torch.where(ids == plane)[0]]
            observe(Site(node.inputs[0], (gate, up), plane), rows)
            gated = activate(node.attrs["act"], rows @ self.matrix(gate, plane).T)
            gated = gated * (rows @ self.matrix(up, plane).T)
            observe(Site(f"{node.outputs[0]}.gated", (down,), plane), gated)

    @torch.no_grad()
    def onward(self, model: ReferenceModel, rows: slice, outputs: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """Runs a part of the graph that begins with this block, and may end behind it, over some rows of what
        reaches the block."""
        return self.walk.run(model, self._values, rows, outputs)

    @torch.no_grad()
    def taps(self, rows: slice, outputs: tuple[str, ...], kv: str = "f32") -> dict[str, torch.Tensor]:
        """Any values of the block for some rows, with its weights as they are now; kv as in `Blocks.run`."""
        return self.walk.run(self.model, self._values, rows, outputs, kv)

    @torch.no_grad()
    def outputs(self, rows: slice) -> dict[str, torch.Tensor]:
        """What the block gives for some rows (see `Blocks.chunks`), by value name, with its weights as they
        are now."""
        return self.walk.run(self.model, self._values, rows, self.block.outputs)

    @torch.no_grad()
    def values(self, names: Collection[str], rows: slice) -> dict[str, torch.Tensor]:
        """Any values that the block reads or computes, for some rows (see `Blocks.chunks`)."""
        made = tuple(name for name in names if name not in self._values)
        out = self.walk.run(self.model, self._values, rows, made) if made else {}
        return out | {name: self._values[name][rows] for name in names if name in self._values}

    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        """The block's weights as checkpoint tensors under the family's own names, float32.

        Raises CheckpointError where the block reads only a part of a tensor.
        """

        def parts() -> Iterator[Any]:
            for name, weight in self.model.graph.weights.items():
                if not isinstance(weight.expr, Constant):
                    yield from invert(weight.expr, self.model.weight(name).detach().numpy())

        return {name: np.asarray(array, np.float32) for name, array in gather(parts()).items()}
