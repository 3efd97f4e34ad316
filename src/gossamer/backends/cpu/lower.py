"""Graph -> native instructions. Each op's operands stand beside its body in csrc/ops.cpp."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from gossamer import _native
from gossamer.errors import GraphError
from gossamer.graph.ir import Graph, Node, R
from gossamer.graph.ops.fused import LINEAR_OPS, PREPARED_FORMATS, matrix_weights

__all__ = ["Instruction", "Lowering", "lower"]

_OPS = (
    "prepare", "linear", "linear_top1", "embed", "rms_norm", "layer_norm", "norm_prepare", "norm_add",
    "add", "scale", "softcap", "activation", "act_mul", "rope", "kv_write", "qkv_write", "attention",
    "take_rows", "take_columns", "top_k_experts", "experts",
    "attention_materialised",
)  # fmt: skip
_ACTS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
_SOURCES = {"floats": 0, "workspace": 1, "prepared": 2}


@dataclass(frozen=True, slots=True)
class Instruction:
    """One emitted instruction: the node it serves, its op as the receipt names it, storage format and
    weights."""

    node: str
    op: str
    format: str
    weights: tuple[tuple[str, int], ...]


@dataclass(slots=True)
class Lowering:
    """State of one lowering: where values lie, which of them hold a tile's rows only, which native index
    each weight has. score_keys: most keys of a row of attention where its scores are to lie in memory; None:
    they stay in tiles."""

    graph: Graph
    program: _native.Program
    offsets: Mapping[str, int]
    tiled: frozenset[str]
    unit_rows: int
    matrices: Mapping[tuple[str, int], int]
    vectors: Mapping[str, int]
    kv_layers: Mapping[int, int]
    score_keys: int | None = None
    emitted: list[Instruction] = field(default_factory=list)
    prepared: tuple[str, str, int, float] | None = None

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
        name: str = "",
    ) -> None:
        """Appends one native instruction. Its rows are those of its first output (or input). name: what the
        receipt calls it, where that is not the native op."""
        rows = self.graph.values[(node.outputs if op != "prepare" else node.inputs)[0]].shape[0]
        self.program.emit(
            _OPS.index(op),
            1 if rows == R else 0,
            [self._operand(v) for v in ins],
            [self._operand(v) for v in outs],
            list(weights),
            list(ints),
            list(reals),
        )
        first = self.graph.weights[reads[0][0]] if reads else None
        stored = "f32" if first is None else first.format + ("_sparse" if first.sparse else "")
        self.emitted.append(Instruction(node.outputs[0], name or op, stored, reads))

    def _operand(self, value: str) -> tuple[int, int]:
        """Arena offset, and bytes from one row to the next (0 where only a tile's rows are there)."""
        whole = value not in self.tiled and self.graph.values[value].dtype != "prepared"
        return self.offsets[value], 4 * self.width(value) if whole else 0

    def width(self, value: str) -> int:
        """Columns of a value."""
        width = self.graph.values[value].shape[1]
        assert isinstance(width, int)
        return width


def lower(lowering: Lowering) -> None:
    """Emits every node of the graph, units as units. Raises GraphError for an op without a native body."""
    graph = lowering.graph
    first = {unit.first for unit in graph.units}
    last = {unit.last for unit in graph.units}
    for i, node in enumerate(graph.nodes):
        if node.op not in _LOWERINGS:
            raise GraphError(f"op {node.op!r} has no CPU kernel")
        if i in last:
            lowering.program.end_unit()
        if i in first or i in last:
            lowering.prepared = None  # the workspace holds a tile's rows, not the step's
        if i in first:
            lowering.program.begin_unit(lowering.unit_rows)
        _LOWERINGS[node.op](lowering, node)
    if len(graph.nodes) in last:
        lowering.program.end_unit()


def _linear(l: Lowering, node: Node) -> None:
    names = matrix_weights(node)
    parts = len(names)
    weight = l.graph.weights[names[0]]
    indices = tuple(l.matrices[name, 0] for name in names)
    biases = tuple(l.vectors[name] for name in node.weights[parts:]) or (-1,) * parts
    source = "floats"
    if l.graph.values[node.inputs[0]].dtype == "prepared":
        source = "prepared"
    elif weight.format in PREPARED_FORMATS:
        source = "workspace"
        # Projections of one input share its quantized form, which stays in the workspace.
        wanted = (node.inputs[0], *weight.reads)
        if l.prepared != wanted:
            l.emit(node, "prepare", ins=node.inputs[:1], weights=indices[:1])
            l.prepared = wanted
    act = node.attrs.get("act")
    gives = node.outputs[0]
    head = (
        node.op == "linear"
        and l.graph.values[gives].shape[0] == R
        and [name for name, value in l.graph.outputs.items() if value == gives] == ["logits"]
    )
    for op in ("linear", "linear_top1") if head else ("linear",):
        l.emit(
            node,
            op,
            ins=node.inputs,
            outs=node.outputs,
            weights=indices + biases,
            ints=(
                parts,
                _SOURCES[source],
                int(node.op == "gated_linear"),
                -1 if act is None else _ACTS[act],
                int(node.op == "linear_add"),
                int(head),
            ),
            reads=tuple((name, 0) for name in names),
            name=node.op if op == "linear" else op,
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


def _norm_prepare(l: Lowering, node: Node) -> None:
    readers = (n for n in l.graph.nodes if n.inputs and n.inputs[0] == node.outputs[0])
    matrix = l.matrices[matrix_weights(next(readers))[0], 0]
    layer_norm = node.op == "layer_norm_quantize"
    gains = tuple(l.vectors[w] for w in node.weights)
    l.emit(
        node,
        "norm_prepare",
        ins=node.inputs,
        outs=node.outputs,
        weights=(*gains, *(() if layer_norm else (-1,)), matrix),
        ints=(l.width(node.inputs[0]), int(layer_norm)),
        reals=(node.attrs["eps"],),
        name=node.op,
    )


def _norm_add(l: Lowering, node: Node) -> None:
    l.emit(
        node,
        "norm_add",
        ins=node.inputs,
        outs=node.outputs,
        weights=(l.vectors[node.weights[0]],),
        ints=(l.width(node.inputs[0]),),
        reals=(node.attrs["eps"],),
        name=node.op,
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


def _qkv_write(l: Lowering, node: Node) -> None:
    a = node.attrs
    constants = [l.vectors[w] for w in node.weights]
    frequencies = constants.pop(0) if a["magnitude"] is not None else -1
    gains = constants or [-1, -1]
    rotary = 2 * l.graph.weights[node.weights[0]].shape[0] if a["magnitude"] is not None else 0
    l.emit(
        node,
        "qkv_write",
        ins=node.inputs[:1],
        outs=node.outputs[:1],
        weights=(frequencies, *gains),
        ints=(l.kv_layers[a["layer"]], a["heads"], rotary),
        reals=(a["magnitude"] or 0.0, a["eps"] or 0.0),
    )


def _attention(l: Lowering, node: Node) -> None:
    a = node.attrs
    ints: tuple[int, ...] = (l.kv_layers[a["layer"]], a["heads"], a["window"] or 0)
    if l.score_keys is not None:
        ints = (*ints, l.score_keys)
        l.prepared = None  # scores take the workspace
    l.emit(
        node,
        "attention" if l.score_keys is None else "attention_materialised",
        ins=node.inputs[:1],
        outs=node.outputs,
        ints=ints,
        reals=(a["scale"], a["softcap"] or 0.0),
    )


def _take_rows(l: Lowering, node: Node) -> None:
    l.emit(node, "take_rows", ins=node.inputs[:1], outs=node.outputs, ints=(l.width(node.inputs[0]),))


def _take_columns(l: Lowering, node: Node) -> None:
    l.emit(
        node,
        "take_columns",
        ins=node.inputs,
        outs=node.outputs,
        weights=(l.vectors[node.weights[0]],),
        ints=(l.width(node.inputs[0]),),
    )


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
    **dict.fromkeys(LINEAR_OPS, _linear),
    "embed": _embed,
    "rms_norm": _norm,
    "layer_norm": _norm,
    "rms_norm_quantize": _norm_prepare,
    "layer_norm_quantize": _norm_prepare,
    "rms_norm_add": _norm_add,
    "add": _elementwise,
    "scale": _elementwise,
    "softcap": _elementwise,
    "activation": _elementwise,
    "act_mul": _elementwise,
    "rope": _rope,
    "kv_write": _kv_write,
    "qkv_write": _qkv_write,
    "attention": _attention,
    "take_rows": _take_rows,
    "take_columns": _take_columns,
    "top_k_experts": _top_k_experts,
    "experts": _experts,
}
