"""What operator fusion makes of linear, norm and elementwise nodes: one node, one pass over memory.

Each op is defined as the composition of the ops it replaces, so that its reference is theirs and a fused
graph computes what the unfused one does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gossamer.errors import GraphError
from gossamer.graph.ir import Node, Shape, Weight
from gossamer.graph.ops.base import OPS, Cost, Signature, added, elements, get_op, op, scaled, weight_bytes
from gossamer.graph.ops.elementwise import ACTIVATIONS, activate
from gossamer.graph.ops.formats import round_activations

if TYPE_CHECKING:
    import torch

    from gossamer.graph.ops.attention import KVState

__all__ = ["LINEAR_OPS", "PREPARED_FORMATS", "matrix_weights"]

LINEAR_OPS = frozenset({"linear", "merged_linear", "gated_linear", "linear_act", "linear_add"})
"""Ops that multiply their first input with stored matrices, and may read it prepared."""
PREPARED_FORMATS = frozenset({"bf16", "int8", "int4", "uint4", "nf4", "fp8"})
"""Weight formats whose kernels read activations in another form than float32."""


def matrix_weights(node: Node) -> tuple[str, ...]:
    """The matrices among a linear op's weights (the others are biases)."""
    if node.op == "merged_linear":
        return node.weights[: node.attrs["parts"]]
    return node.weights[:2] if node.op == "gated_linear" else node.weights[:1]


def _columns(node: Node, weights: Sequence[Weight], k: Any) -> list[int]:
    """Outputs of each matrix. Raises GraphError where matrices, biases and input do not fit together."""
    parts = len(matrix_weights(node))
    matrices, biases = weights[:parts], weights[parts:]
    sizes = [w.shape[0] for w in matrices]
    if any(w.shape[1] != k for w in matrices):
        raise GraphError(f"{node.op} {node.outputs[0]}: input has {k} columns, weights {_shapes(matrices)}")
    if biases and [b.shape for b in biases] != [(n,) for n in sizes]:
        raise GraphError(f"{node.op} {node.outputs[0]}: biases {_shapes(biases)} for outputs {sizes}")
    if len({w.reads for w in matrices}) > 1:
        raise GraphError(
            f"{node.op} {node.outputs[0]}: its weights are stored in different formats, or scale their "
            "activations differently"
        )
    return sizes


def _shapes(weights: Sequence[Weight]) -> str:
    return ", ".join(str(w.shape) for w in weights)


def _linear_shapes(node: Node, inputs: Sequence[Shape], weights: Sequence[Weight]) -> Signature:
    rows, k = inputs[0]
    sizes = _columns(node, weights, k)
    if node.attrs.get("act", "silu") not in ACTIVATIONS:
        raise GraphError(f"activation {node.attrs['act']!r} is not one of {', '.join(ACTIVATIONS)}")
    if node.op == "gated_linear" and sizes[0] != sizes[1]:
        raise GraphError(f"gated_linear {node.outputs[0]}: {sizes[0]} gates for {sizes[1]} outputs")
    width = sum(sizes) if node.op == "merged_linear" else sizes[0]
    if node.op == "linear_add" and inputs[1] != (rows, width):
        raise GraphError(f"linear_add {node.outputs[0]}: adds {inputs[1]} to {(rows, width)}")
    return (((rows, width), "f32"),)


def _linear_cost(node: Node, inputs: Sequence[Shape], weights: Sequence[Weight]) -> Cost:
    rows, k = elements((inputs[0][0],)), inputs[0][1]
    assert isinstance(k, int)
    n = sum(w.shape[0] for w in weights[: len(matrix_weights(node))])
    read = {"1": sum(weight_bytes(w) for w in weights)}
    out = n // 2 if node.op == "gated_linear" else n
    moved = k + out * (2 if node.op == "linear_add" else 1)
    return Cost(flops=scaled(rows, 2.0 * n * k), bytes=added(read, scaled(rows, 4.0 * moved)))


def _product(x: torch.Tensor, weights: Sequence[torch.Tensor], index: int, parts: int) -> torch.Tensor:
    from torch.nn.functional import linear

    return linear(x, weights[index], weights[parts + index] if len(weights) > parts else None)


def _merged_linear(
    attrs: Mapping[str, Any], inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], kv: KVState
) -> tuple[torch.Tensor, ...]:
    import torch

    parts = attrs["parts"]
    return (torch.cat([_product(inputs[0], weights, i, parts) for i in range(parts)], -1),)


def _gated_linear(
    attrs: Mapping[str, Any], inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], kv: KVState
) -> tuple[torch.Tensor, ...]:
    gate, up = (_product(inputs[0], weights, i, 2) for i in range(2))
    return (activate(attrs["act"], gate) * up,)


def _linear_act(
    attrs: Mapping[str, Any], inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], kv: KVState
) -> tuple[torch.Tensor, ...]:
    return (activate(attrs["act"], _product(inputs[0], weights, 0, 1)),)


def _linear_add(
    attrs: Mapping[str, Any], inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], kv: KVState
) -> tuple[torch.Tensor, ...]:
    return (inputs[1] + _product(inputs[0], weights, 0, 1),)


for _name, _inputs, _weights, _attrs, _reference, _doc in (
    (
        "merged_linear", 1, (2, 6), ("parts",), _merged_linear,
        "y = x . [w1; w2; ..]^T (+ biases): projections of one input side by side",
    ),
    (
        "gated_linear", 1, (2, 4), ("act",), _gated_linear,
        "act(x . gate^T (+ bias)) * (x . up^T (+ bias))",
    ),
    ("linear_act", 1, (1, 2), ("act",), _linear_act, "act(x . weight^T (+ bias))"),
    ("linear_add", 2, (1, 2), (), _linear_add, "residual + x . weight^T (+ bias)"),
):  # fmt: skip
    op(
        _name,
        inputs=(_inputs, _inputs),
        weights=_weights,
        attrs=frozenset(_attrs),
        shapes=_linear_shapes,
        cost=_linear_cost,
        reference=_reference,
        doc=_doc,
    )


def _norm_shapes(node: Node, inputs: Sequence[Shape], weights: Sequence[Weight]) -> Signature:
    plain = get_op(node.op.removesuffix("_quantize")).shapes(node, inputs, weights)
    if weights[0].shape[0] != inputs[0][1]:
        raise GraphError(f"{node.op} {node.outputs[0]}: norms whole rows of {inputs[0][1]} only")
    if node.attrs["format"] not in PREPARED_FORMATS:
        raise GraphError(f"{node.op} {node.outputs[0]}: {node.attrs['format']} reads float32 activations")
    return ((plain[0][0], "prepared"),)


def _norm_cost(node: Node, inputs: Sequence[Shape], weights: Sequence[Weight]) -> Cost:
    count = elements(inputs[0])
    size = 2 if node.attrs["format"] == "bf16" else 1
    return Cost(flops=scaled(count, 6), bytes=scaled(count, 4.0 + size))


def _then_quantize(norm: str) -> Callable[..., tuple[torch.Tensor, ...]]:
    def reference(
        attrs: Mapping[str, Any], inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], kv: KVState
    ) -> tuple[torch.Tensor, ...]:
        (normed,) = OPS[norm].reference(attrs, inputs, weights, kv)
        rounded = round_activations(normed, attrs["format"], attrs["group"], attrs["scale"])
        return (rounded.to(normed.dtype),)

    return reference


for _norm in ("rms_norm", "layer_norm"):
    op(
        f"{_norm}_quantize",
        inputs=(1, 1),
        weights=(1, 1) if _norm == "rms_norm" else (2, 2),
        attrs=frozenset({"eps", "format", "group", "scale"}),
        shapes=_norm_shapes,
        cost=_norm_cost,
        reference=_then_quantize(_norm),
        doc=f"{_norm}, then as the kernels of that weight format read it",
    )


def _norm_add_shapes(node: Node, inputs: Sequence[Shape], weights: Sequence[Weight]) -> Signature:
    if inputs[0] != inputs[1] or weights[0].shape != (inputs[0][1],):
        raise GraphError(
            f"rms_norm_add {node.outputs[0]}: {inputs[0]} and {inputs[1]}, norm of {weights[0].shape}"
        )
    return ((inputs[0], "f32"),)


def _norm_add_cost(node: Node, inputs: Sequence[Shape], weights: Sequence[Weight]) -> Cost:
    count = elements(inputs[0])
    return Cost(flops=scaled(count, 5), bytes=scaled(count, 12))


def _rms_norm_add(
    attrs: Mapping[str, Any], inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], kv: KVState
) -> tuple[torch.Tensor, ...]:
    return (inputs[1] + OPS["rms_norm"].reference(attrs, inputs[:1], weights, kv)[0],)


op(
    "rms_norm_add",
    inputs=(2, 2),
    weights=(1, 1),
    attrs=frozenset({"eps"}),
    shapes=_norm_add_shapes,
    cost=_norm_add_cost,
    reference=_rms_norm_add,
    doc="residual + rms_norm(x)",
)


def _qkv_widths(node: Node) -> tuple[int, int]:
    size = node.attrs["head_dim"]
    return node.attrs["heads"] * size, node.attrs["kv_heads"] * size


def _qkv_shapes(node: Node, inputs: Sequence[Shape], weights: Sequence[Weight]) -> Signature:
    rows, width = inputs[0]
    queries, keys = _qkv_widths(node)
    rotary, normed = node.attrs["magnitude"] is not None, node.attrs["eps"] is not None
    if width != queries + 2 * keys:
        raise GraphError(f"qkv_write {node.outputs[0]}: width {width}, {queries} of queries and twice {keys}")
    if len(weights) != rotary + 2 * normed:
        raise GraphError(f"qkv_write {node.outputs[0]}: {len(weights)} weights; frequencies and norms differ")
    size = node.attrs["head_dim"]
    if (rotary and 2 * weights[0].shape[0] > size) or any(w.shape != (size,) for w in weights[rotary:]):
        raise GraphError(f"qkv_write {node.outputs[0]}: weights {_shapes(weights)} for heads of {size}")
    return (((rows, queries), "f32"), ((rows, keys), "kv"))


def _qkv_cost(node: Node, inputs: Sequence[Shape], weights: Sequence[Weight]) -> Cost:
    queries, keys = _qkv_widths(node)
    rows = elements((inputs[0][0],))
    return Cost(flops=scaled(rows, 3.0 * (queries + keys)), bytes=scaled(rows, 8.0 * queries + 12.0 * keys))


def _qkv_write(
    attrs: Mapping[str, Any], inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], kv: KVState
) -> tuple[Any, ...]:
    size, rotary = attrs["head_dim"], attrs["magnitude"] is not None
    queries, keys = attrs["heads"] * size, attrs["kv_heads"] * size
    import torch

    q, k, v = torch.split(inputs[0], [queries, keys, keys], -1)
    if attrs["eps"] is not None:
        norms = weights[rotary:]
        q, k = (OPS["rms_norm"].reference(attrs, [x], [w], kv)[0] for x, w in zip((q, k), norms, strict=True))
    if rotary:
        q, k = (OPS["rope"].reference(attrs, [x, inputs[1]], weights[:1], kv)[0] for x in (q, k))
    return (q, *OPS["kv_write"].reference(attrs, [k, v], [], kv))


op(
    "qkv_write",
    inputs=(2, 2),
    weights=(0, 3),
    attrs=frozenset({"layer", "heads", "kv_heads", "head_dim", "magnitude", "eps"}),
    shapes=_qkv_shapes,
    cost=_qkv_cost,
    reference=_qkv_write,
    doc="splits [q k v], norms (eps) and rotates (magnitude) queries and keys, writes keys and values",
)
