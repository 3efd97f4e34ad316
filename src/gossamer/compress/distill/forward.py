"""A model over whole windows of text: logits and taps, with the activations of layers kept or made again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gossamer.backends.reference import ReferenceModel
from gossamer.graph.ir import Graph
from gossamer.graph.ops.attention import KVState, SpanRows

__all__ = ["Forward", "attention_taps", "hidden_taps"]


def hidden_taps(graph: Graph) -> tuple[str, ...]:
    """The value that every layer gives, first to last."""
    return tuple(block.outputs[0] for block in graph.blocks(depth=2))


def attention_taps(graph: Graph) -> tuple[str, ...]:
    """What attention gives in every layer that has one, heads side by side."""
    return tuple(node.outputs[0] for node in graph.nodes if node.op == "attention")


class Forward:
    """Runs a model from position 0 of every window. Calling it with ids [B, L] gives "logits" [B * L, V] and
    the tapped values [B * L, ...] by name.

    checkpointing: of each layer only its inputs are kept for the backward pass (Chen et al. 2016).
    """

    def __init__(
        self, model: ReferenceModel, taps: Sequence[str] = (), *, checkpointing: bool = False
    ) -> None:
        self.model, self.taps = model, tuple(taps)
        self._stages = self._cut() if checkpointing else ()

    def __call__(self, ids_BL: Tensor) -> dict[str, Tensor]:
        batch, length = ids_BL.shape
        rows = torch.arange(batch * length)
        kv = KVState(tuple(SpanRows(b, b * length, length, 0) for b in range(batch)))
        given = (ids_BL.flatten(), rows % length, rows, kv)
        if not self._stages:
            out: dict[str, Tensor] = self.model(*given, ("logits", *self.taps))
            return out
        values: dict[str, Tensor] = {}
        for stage, outputs, again in self._stages:
            names = [name for name in stage.graph.inputs if name in values]

            def run(*inputs: Tensor, stage=stage, outputs=outputs, names=names) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
                out = stage(*given, outputs, dict(zip(names, inputs, strict=True)))
                return tuple(out[name] for name in outputs)

            inputs = [values[name] for name in names]
            made = checkpoint(run, *inputs, use_reentrant=False) if again else run(*inputs)
            values.update(zip(outputs, made, strict=True))
        return {"logits": values[self.model.graph.outputs["logits"]]} | {
            tap: values[tap] for tap in self.taps
        }

    def _cut(self) -> tuple[tuple[ReferenceModel, tuple[str, ...], bool], ...]:
        """What is before the layers, each layer, and what is behind: the parts, their outputs, and whether
        they are computed again."""
        graph = self.model.graph
        layers = [(block.nodes, True) for block in graph.blocks(depth=2)]
        at = graph.nodes.index(layers[0][0][0])
        end = graph.nodes.index(layers[-1][0][-1]) + 1
        stages = []
        for nodes, again in [(graph.nodes[:at], False), *layers, (graph.nodes[end:], False)]:
            own = set(map(id, nodes))
            wanted = {v for node in graph.nodes if id(node) not in own for v in node.inputs}
            wanted |= {graph.outputs["logits"], *self.taps}
            outputs = tuple(v for node in nodes for v in node.outputs if v in wanted)
            stages.append((self.model.part(nodes, {name: name for name in outputs}), outputs, again))
        return tuple(stages)
