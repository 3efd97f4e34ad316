"""How a family writes its graph: ops as calls, shapes inferred, scopes as `with` blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gossamer.errors import GraphError
from gossamer.graph.ir import Graph, KVGroup, Node, R, Shape, T, Value, Weight
from gossamer.graph.ops import get_op
from gossamer.graph.verify import verify
from gossamer.graph.weights import Tensor, WeightExpr

__all__ = ["Builder"]


class Builder:
    """Collects nodes, values and weights; `finish` gives the verified graph."""

    def __init__(self, name: str, family: str) -> None:
        self.name = name
        self.family = family
        self._scope: list[str] = []
        self._nodes: list[Node] = []
        self._weights: dict[str, Weight] = {}
        self._values = {
            "ids": Value("ids", (T,), "i32"),
            "positions": Value("positions", (T,), "i32"),
            "rows": Value("rows", (R,), "i32"),
        }

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Nodes and values made inside are named under `name`."""
        self._scope.append(name)
        try:
            yield
        finally:
            self._scope.pop()

    def weight(self, name: str, expr: WeightExpr) -> str:
        """A weight under the current scope; the same name again must mean the same expression."""
        return self.shared_weight(".".join([*self._scope, name]), expr)

    def shared_weight(self, name: str, expr: WeightExpr) -> str:
        """A weight of the whole model, named without the scope; made once."""
        if self._weights.setdefault(name, Weight(name, expr.shape, expr)).expr != expr:
            raise GraphError(f"weight {name!r} is defined twice, in two ways")
        return name

    def tensor(self, name: str, tensor: str, *shape: int) -> str:
        """A weight that is one checkpoint tensor."""
        return self.weight(name, Tensor(tensor, shape))

    def op(self, op: str, *inputs: str, weights: tuple[str, ...] = (), out: str = "", **attrs: Any) -> str:
        """Appends a node; gives the name of its first output. `out` names it (default: the op)."""
        return self.ops(op, *inputs, weights=weights, out=(out,) if out else (), **attrs)[0]

    def ops(
        self, op: str, *inputs: str, weights: tuple[str, ...] = (), out: tuple[str, ...] = (), **attrs: Any
    ) -> tuple[str, ...]:
        """As `op`, for nodes of several outputs."""
        scope = ".".join(self._scope)
        shapes: list[Shape] = [self._values[v].shape for v in inputs]
        probe = Node(op, inputs, out or (op,), weights, attrs, scope)
        signature = get_op(op).shapes(probe, shapes, [self._weights[w] for w in weights])
        names = out or tuple(op if i == 0 else f"{op}_{i}" for i in range(len(signature)))
        full = tuple(self._fresh(".".join([*self._scope, n])) for n in names)
        for name, (shape, dtype) in zip(full, signature, strict=True):
            self._values[name] = Value(name, shape, dtype)
        self._nodes.append(Node(op, inputs, full, weights, attrs, scope))
        return full

    def linear(self, x: str, weight: str, bias: str | None = None, out: str = "linear") -> str:
        """x . weight^T (+ bias)."""
        return self.op("linear", x, weights=(weight,) if bias is None else (weight, bias), out=out)

    def _fresh(self, name: str) -> str:
        candidate, count = name, 1
        while candidate in self._values:
            count += 1
            candidate = f"{name}_{count}"
        return candidate

    def finish(
        self,
        *,
        outputs: dict[str, str],
        vocab: int,
        hidden: int,
        layers: int,
        max_positions: int,
        reach: int | None = None,
        kv_groups: tuple[KVGroup, ...],
    ) -> Graph:
        """The graph. Raises GraphError when it is inconsistent."""
        graph = Graph(
            name=self.name,
            family=self.family,
            vocab=vocab,
            hidden=hidden,
            layers=layers,
            max_positions=max_positions,
            reach=max_positions if reach is None else reach,
            inputs=("ids", "positions", "rows"),
            outputs=outputs,
            nodes=tuple(self._nodes),
            values=self._values,
            weights=self._weights,
            kv_groups=kv_groups,
        )
        verify(graph)
        return graph
