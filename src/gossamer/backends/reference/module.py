"""A graph as a `torch.nn.Module`: every node runs its op's reference definition, in order.

Nodes are resolved into steps once per set of outputs, so that a forward pass is a flat loop; a value is
dropped as soon as its last reader ran.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from gossamer.checkpoint.weights import Part, WeightSource, evaluate, gather, invert
from gossamer.errors import GraphError
from gossamer.graph.ir import Graph, Node, Weight
from gossamer.graph.ops import get_op
from gossamer.graph.ops.attention import KVState, SpanRows
from gossamer.graph.ops.base import Reference
from gossamer.graph.ops.formats import round_activations, round_weight
from gossamer.graph.ops.fused import LINEAR_OPS, PREPARED_FORMATS
from gossamer.graph.ops.rope import rope_tables, rotate
from gossamer.graph.part import part
from gossamer.graph.weights import Constant, stored_format

__all__ = ["ReferenceModel", "export_tensors"]


@dataclass(frozen=True, slots=True)
class _Step:
    """A node ready to run. weights: (dictionary, key) of each, looked up at run time because `.to()` and
    functional_call replace tensors; stored: the weight whose format decides how a linear layer sees its
    input; frees: values that nothing reads afterwards."""

    node: Node
    reference: Reference
    weights: tuple[tuple[Mapping[str, Any], str], ...]
    stored: Weight | None
    frees: tuple[str, ...]


class ReferenceModel(nn.Module):
    """A graph that runs in torch.

    Its parameters are the graph's weights under their own (dotted) names, a tied weight once; weights
    that config.json implies (rotary frequencies) are buffers, float32 whatever the model's dtype. Weights
    of a quantized format, and the inputs of their linear layers, hold the values that the format gives.
    """

    def __init__(self, graph: Graph, *, dtype: torch.dtype = torch.float32) -> None:
        """Allocates parameters without filling them; see `load`."""
        super().__init__()
        self.graph = graph
        self._places: dict[str, tuple[dict[str, Any], str]] = {}
        self._plans: dict[tuple[tuple[str, ...], bool], tuple[_Step, ...]] = {}
        for weight in graph.weights.values():
            self._register(weight, dtype)

    @classmethod
    def load(
        cls,
        graph: Graph,
        source: WeightSource,
        dtype: torch.dtype = torch.float32,
        *,
        on_weight: Callable[[Weight], None] | None = None,
    ) -> Self:
        """A model with the source's weights, one in memory at a time beside the model.

        on_weight is told of each weight once it is in place (progress bars). Raises CheckpointError.
        """
        model = cls(graph, dtype=dtype)
        parameters = dict(model.named_parameters())
        for weight in graph.weights.values():
            if not isinstance(weight.expr, Constant):
                value = evaluate(weight.expr, source)
                # What storing it so would do to it, unless these are the values that it is stored in.
                if weight.format != "f32" and stored_format(weight.expr) != (weight.format, weight.group):
                    exact = torch.from_numpy(value.astype(np.float32))
                    value = round_weight(exact, weight.format, weight.group).numpy()
                _to_numpy(parameters[weight.name])[...] = value
            if on_weight is not None:
                on_weight(weight)
        return model

    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        rows: torch.Tensor,
        kv: KVState,
        outputs: Sequence[str] = ("logits",),
        inputs: Mapping[str, torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Runs one step. ids, positions [T] and rows [R] are integers; kv says how rows form sequences;
        inputs: the graph's further ones ("features" of a draft head).

        outputs: names of graph outputs or of any value (a tap, such as "layers.3.mlp.residual"). With
        kv.cache None the pass is differentiable and computes only what the outputs need. Raises GraphError
        for an unknown output, an input that is missing or spans that do not cover the rows.
        """
        row = 0
        for span in kv.spans:
            if span.row != row:
                raise GraphError(f"span of sequence {span.sequence} begins at row {span.row}, not {row}")
            row += span.count
        if row != ids.shape[0]:
            raise GraphError(f"the spans cover {row} rows of {ids.shape[0]}")
        values: dict[str, Any] = {"ids": ids, "positions": positions, "rows": rows, **(inputs or {})}
        if missing := sorted(set(self.graph.inputs) - set(values)):
            raise GraphError(f"graph {self.graph.name} also needs the inputs {', '.join(missing)}")
        names = {name: self.graph.outputs.get(name, name) for name in outputs}
        self._run(self._plan(tuple(names.values()), kv.cache is None), values, kv)
        return {name: values[value] for name, value in names.items()}

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits [B, L, vocab] of B sequences of L ids each, from position 0, without a cache."""
        batch, length = ids.shape
        rows = torch.arange(batch * length, device=ids.device)
        spans = tuple(SpanRows(b, b * length, length, 0) for b in range(batch))
        out = self(ids.flatten(), rows % length, rows, KVState(spans))
        logits: torch.Tensor = out["logits"]
        return logits.view(batch, length, -1)

    def weight(self, name: str) -> torch.Tensor:
        """The parameter or buffer of that name. Raises KeyError."""
        table, key = self._places[name]
        tensor: torch.Tensor = table[key]
        return tensor

    def part(self, nodes: Sequence[Node], outputs: Mapping[str, str]) -> Self:
        """A stretch of the model (`gossamer.graph.part`) that shares this one's weights."""
        stretch = type(self)(part(self.graph, nodes, outputs))
        for name, (table, key) in stretch._places.items():
            table[key] = self.weight(name)
        return stretch

    def _register(self, weight: Weight, dtype: torch.dtype) -> None:
        *path, key = weight.name.split(".")
        place: nn.Module = self
        for name in path:
            if name not in place._modules:
                place.add_module(name, nn.Module())
            place = place._modules[name]  # type: ignore[assignment]
        if isinstance(weight.expr, Constant):
            place.register_buffer(
                key, torch.tensor(weight.expr.values, dtype=torch.float32), persistent=False
            )
            self._places[weight.name] = (place._buffers, key)
        else:
            place.register_parameter(key, nn.Parameter(torch.empty(weight.shape, dtype=dtype)))
            self._places[weight.name] = (place._parameters, key)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """As nn.Module's, but constants follow the model to its device only, never to a half type."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for weight in self.graph.weights.values():
            if isinstance(weight.expr, Constant):
                table, key = self._places[weight.name]
                table[key] = torch.tensor(weight.expr.values, dtype=torch.float32, device=table[key].device)
        return self

    def _plan(self, wanted: tuple[str, ...], cache_free: bool) -> tuple[_Step, ...]:
        """The steps that `wanted` values need; with a cache every layer's keys are needed as well."""
        if (wanted, cache_free) not in self._plans:
            self._plans[wanted, cache_free] = tuple(self._steps(set(wanted), cache_free))
        return self._plans[wanted, cache_free]

    def _steps(self, wanted: set[str], cache_free: bool) -> Iterator[_Step]:
        if unknown := sorted(wanted - set(self.graph.values)):
            raise GraphError(f"graph {self.graph.name} has no output or value {', '.join(unknown)}")
        nodes: list[Node] = []
        needed = set(wanted)
        for node in reversed(self.graph.nodes):
            if needed.intersection(node.outputs) or (node.op in ("kv_write", "qkv_write") and not cache_free):
                nodes.append(node)
                needed.update(node.inputs)
        last = {value: node for node in reversed(nodes) for value in (*node.outputs, *node.inputs)}
        for node in reversed(nodes):
            dead = {v for v in (*node.inputs, *node.outputs) if last[v] is node and v not in wanted}
            places = tuple(self._places[w] for w in node.weights)
            stored = self._seen_through(node)
            yield _Step(node, get_op(node.op).reference, places, stored, tuple(dead))

    def _seen_through(self, node: Node) -> Weight | None:
        """The weight whose format decides how a linear op sees its input; None where it sees it as it is."""
        if node.op not in LINEAR_OPS or self.graph.values[node.inputs[0]].dtype == "prepared":
            return None
        weight = self.graph.weights[node.weights[0]]
        return weight if weight.format in PREPARED_FORMATS else None

    def _run(self, steps: tuple[_Step, ...], values: dict[str, Any], kv: KVState) -> None:
        # Queries and keys of layers with the same frequencies turn by the same angles.
        tables: dict[tuple[Any, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        for step in steps:
            node = step.node
            weights = [table[key] for table, key in step.weights]
            if node.op == "rope":
                x, magnitude = values[node.inputs[0]], node.attrs["magnitude"]
                which = (node.inputs[1], node.weights[0], magnitude, x.dtype)
                if which not in tables:
                    tables[which] = rope_tables(values[node.inputs[1]], weights[0], magnitude, x.dtype)
                values[node.outputs[0]] = rotate(x, *tables[which], node.attrs["head_dim"])
                del x
            else:
                inputs = [values[v] for v in node.inputs]
                if step.stored is not None:
                    rounded = round_activations(inputs[0], *step.stored.reads)
                    inputs[0] = rounded.to(inputs[0].dtype)
                results = step.reference(node.attrs, inputs, weights, kv)
                values.update(zip(node.outputs, results, strict=True))
                del inputs, results
            for name in step.frees:
                del values[name]


def export_tensors(model: ReferenceModel) -> dict[str, npt.NDArray[Any]]:
    """The model's weights as checkpoint tensors under the family's own names, in the model's dtype.

    Raises CheckpointError where the graph reads only a part of a tensor.
    """

    def parts() -> Iterator[Part]:
        for name, parameter in model.named_parameters():
            array = _to_numpy(parameter)
            for piece in invert(model.graph.weights[name].expr, array):
                yield Part(piece.tensor, piece.axis, piece.start, piece.stop, piece.array.astype(array.dtype))

    return gather(parts())


def _to_numpy(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """The tensor's values, in its own memory where it is on the CPU."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:  # numpy's bfloat16 is ml_dtypes', which torch does not know
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
