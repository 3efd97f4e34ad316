"""Graph -> native instructions. Each op's operands stand beside its body in csrc/program.cpp."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from gossamer import _native
from gossamer.errors import GraphError
from gossamer.graph.ir import Graph, Node, R

__all__ = ["Instruction", "Lowering", "lower"]

_OPS = (
    "prepare", "linear", "embed", "rms_norm", "layer_norm", "add", "scale", "softcap", "activation",
    "act_mul", "rope", "kv_write", "attention", "take_rows", "top_k_experts", "experts",
)  # fmt: skip
_ACTS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
_PREPARED = {"bf16", "int8", "int4"}  # formats whose kernels do not read fp32 activations


@dataclass(frozen=True, slots=True)
class Instruction:
    """One emitted instruction: the node it serves, its op, storage format and weights, for the receipt."""

    node: str
    op: str
    format: str
    weights: tuple[tuple[str, int], ...]


@dataclass(slots=True)
class Lowering:
    """State of one lowering: where values lie, which native index each weight has."""

    graph: Graph
    program: _native.Program
    offsets: Mapping[str, int]
    matrices: Mapping[tuple[str, int], int]
    vectors: Mapping[str, int]
    kv_layers: Mapping[int, int]
    emitted: list[Instruction] = field(default_factory=list)
    prepared: tuple[str, str, int] | None = None

    def emit(
        self,
        node: Node,
        op: str,
        *,
        ins: tuple[str, ...] = (),
        outs: tuple[str, ...] = (),
        weights: tuple[int, ...] = (),
        ints: tuple[int, ...] = (),
        reals: tuple[float, ...] = (),
        reads: tuple[tuple[str, int], ...] = (),
    ) -> None:
        """Appends one native instruction. Its rows are those of its first output (or input)."""
        rows = self.graph.values[(node.outputs if op != "prepare" else node.inputs)[0]].shape[0]
        self.program.emit(
            _OPS.index(op),
            1 if rows == R else 0,
            [self.offsets[v] for v in ins],
            [self.offsets[v] for v in outs],
            list(weights),
            list(ints),
            list(reals),
        )
        stored = self.graph.weights[reads[0][0]].format if reads else "f32"
        self.emitted.append(Instruction(node.outputs[0], op, stored, reads))

    def width(self, value: str) -> int:
        """Columns of a value."""
        width = self.graph.values[value].shape[1]
        assert isinstance(width, int)
        return width


def lower(lowering: Lowering) -> None:
    """Emits every node of the graph. Raises GraphError for an op without a native body."""
    for node in lowering.graph.nodes:
        if node.op not in _LOWERINGS:
            raise GraphError(f"op {node.op!r} has no CPU kernel")
        _LOWERINGS[node.op](lowering, node)


def _linear(l: Lowering, node: Node) -> None:
    weight = l.graph.weights[node.weights[0]]
    index = l.matrices[weight.name, 0]
    if weight.format in _PREPARED:
        # Projections of one input share its quantized form, which stays in the workspace.
        wanted = (node.inputs[0], weight.format, weight.group)
        if l.prepared != wanted:
            l.emit(node, "prepare", ins=node.inputs, weights=(index,))
            l.prepared = wanted
    bias = l.vectors[node.weights[1]] if len(node.weights) > 1 else -1
    l.emit(
        node, "linear", ins=node.inputs, outs=node.outputs, weights=(index, bias), reads=((weight.name, 0),)
    )


def _embed(l: Lowering, node: Node) -> None:
    name = node.weights[0]
    l.emit(
        node,
        "embed",
        outs=node.outputs,
        weights=(l.matrices[name, 0],),
        ints=(int(node.inputs[0] == "positions"),),
        reals=(node.attrs["scale"],),
        reads=((name, 0),),
    )


def _norm(l: Lowering, node: Node) -> None:
    size = l.graph.weights[node.weights[0]].shape[0]
    l.emit(
        node,
        node.op,
        ins=node.inputs,
        outs=node.outputs,
        weights=tuple(l.vectors[w] for w in node.weights),
        ints=(size, l.width(node.inputs[0]) // size),
        reals=(node.attrs["eps"],),
    )


def _elementwise(l: Lowering, node: Node) -> None:
    ints = [l.width(node.inputs[0])]
    if "act" in node.attrs:
        ints.append(_ACTS[node.attrs["act"]])
    reals = tuple(node.attrs[name] for name in ("factor", "cap") if name in node.attrs)
    l.emit(node, node.op, ins=node.inputs, outs=node.outputs, ints=tuple(ints), reals=reals)


def _rope(l: Lowering, node: Node) -> None:
    size = node.attrs["head_dim"]
    rotary = 2 * l.graph.weights[node.weights[0]].shape[0]
    l.emit(
        node,
        "rope",
        ins=node.inputs[:1],
        outs=node.outputs,
        weights=(l.vectors[node.weights[0]],),
        ints=(l.width(node.inputs[0]) // size, size, rotary),
        reals=(node.attrs["magnitude"],),
    )


def _kv_write(l: Lowering, node: Node) -> None:
    l.emit(node, "kv_write", ins=node.inputs, ints=(l.kv_layers[node.attrs["layer"]],))


def _attention(l: Lowering, node: Node) -> None:
    a = node.attrs
    l.emit(
        node,
        "attention",
        ins=node.inputs[:1],
        outs=node.outputs,
        ints=(l.kv_layers[a["layer"]], a["heads"], a["window"] or 0),
        reals=(a["scale"], a["softcap"] or 0.0),
    )


def _take_rows(l: Lowering, node: Node) -> None:
    l.emit(node, "take_rows", ins=node.inputs[:1], outs=node.outputs, ints=(l.width(node.inputs[0]),))


def _top_k_experts(l: Lowering, node: Node) -> None:
    a = node.attrs
    l.emit(
        node,
        "top_k_experts",
        ins=node.inputs,
        outs=node.outputs,
        ints=(l.width(node.inputs[0]), a["k"], int(a["renormalise"])),
    )


def _experts(l: Lowering, node: Node) -> None:
    count = l.graph.weights[node.weights[0]].shape[0]
    l.prepared = None  # the op uses the workspace for itself
    l.emit(
        node,
        "experts",
        ins=node.inputs,
        outs=node.outputs,
        weights=tuple(l.matrices[w, 0] for w in node.weights),
        ints=(count, l.width(node.inputs[1]), _ACTS[node.attrs["act"]]),
        reads=tuple((w, e) for w in node.weights for e in range(count)),
    )


_LOWERINGS: dict[str, Callable[[Lowering, Node], None]] = {
    "linear": _linear,
    "embed": _embed,
    "rms_norm": _norm,
    "layer_norm": _norm,
    "add": _elementwise,
    "scale": _elementwise,
    "softcap": _elementwise,
    "activation": _elementwise,
    "act_mul": _elementwise,
    "rope": _rope,
    "kv_write": _kv_write,
    "attention": _attention,
    "take_rows": _take_rows,
    "top_k_experts": _top_k_experts,
    "experts": _experts,
}
