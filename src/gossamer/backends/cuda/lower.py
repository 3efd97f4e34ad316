"""Nodes -> kernels: every node of a graph becomes a call over views of the arena, ready to run step by step.

Layer fusion's units have no part in it: what they keep in a CPU's caches a GPU's kernels keep in registers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gossamer.backends.cuda.kernels import (
    attention,
    elementwise,
    embed,
    experts,
    kv_write,
    linear,
    norm,
    routing,
)
from gossamer.backends.cuda.packing import PackedWeight
from gossamer.backends.cuda.step import Batch, KvLayer
from gossamer.backends.cuda.values import Quantized
from gossamer.errors import NotBuiltError
from gossamer.graph.ir import Graph, Node, R
from gossamer.graph.ops.fused import LINEAR_OPS, matrix_weights

__all__ = ["Call", "Instruction", "Step", "lower"]

_Rows = torch.Tensor | Quantized


@dataclass(frozen=True, slots=True)
class Step:
    """One step on the device: ids [T] and rows [R] int32, and how rows belong to sequences."""

    ids: torch.Tensor
    rows: torch.Tensor
    batch: Batch

    def count(self, sampled: bool) -> int:
        """Rows of values that follow T, or R."""
        return int((self.rows if sampled else self.ids).shape[0])


Call = Callable[[Step], str]
"""Runs a node; gives the name of the kernel that did."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """A node that is ready to run. weights: what it reads, for their bytes; sampled: over R rows, not T."""

    node: str
    op: str
    weights: tuple[str, ...]
    sampled: bool
    call: Call


@dataclass(frozen=True, slots=True, kw_only=True)
class Lowering:
    """What calls are made over: every value at its largest, weights, KV by layer with its group, room for
    rows that a layer quantizes for itself, and the scratch of attention."""

    graph: Graph
    values: Mapping[str, _Rows]
    weights: Mapping[str, PackedWeight]
    layers: Mapping[int, tuple[int, KvLayer]]
    quantized: Quantized | None
    scratch: torch.Tensor | None

    def get(self, name: str, count: int) -> Any:
        """The first rows of a value."""
        value = self.values[name]
        if isinstance(value, Quantized):
            return Quantized(value.data[:count], value.scales[:count])
        return value[:count]

    def floats(self, name: str) -> torch.Tensor:
        """A vector: a norm, a bias, frequencies."""
        return self.weights[name].data


def lower(low: Lowering) -> list[Instruction]:
    """Every node in order. Raises NotBuiltError for an op that has no kernel here."""
    made = []
    for node in low.graph.nodes:
        sampled = low.graph.values[node.outputs[0]].shape[0] == R
        make = _linear if node.op in LINEAR_OPS else _MAKERS.get(node.op)
        if make is None:
            raise NotBuiltError(f"the cuda backend has no kernel for {node.op} yet; --device cpu runs it")
        weights = tuple(node.weights)
        made.append(Instruction(node.outputs[0], node.op, weights, sampled, make(low, node, sampled)))
    return made


def _linear(low: Lowering, node: Node, sampled: bool) -> Call:
    matrices = matrix_weights(node)
    weights = [low.weights[name] for name in matrices]
    biases = [low.floats(name) for name in node.weights if name not in matrices]
    x_name, out_name = node.inputs[0], node.outputs[0]
    residual_name = node.inputs[1] if node.op == "linear_add" else None
    act = node.attrs["act"] if node.op in ("linear_act", "gated_linear") else None
    own = all(w.stored == "int8" for w in weights)

    def call(step: Step) -> str:
        count = step.count(sampled)
        x, scales = low.get(x_name, count), None  # type: Any, torch.Tensor | None
        if isinstance(x, Quantized):
            x, scales = x.data, x.scales
        elif own and low.quantized is not None:
            rows = low.quantized.data[:count, : x.shape[1]]
            scales = low.quantized.scales[:count]
            norm.quantize_rows(rows, scales, x, weights[0].activation_scale)
            x = rows
        residual = None if residual_name is None else low.get(residual_name, count)
        return linear.linear(
            low.get(out_name, count),
            x,
            weights,
            biases,
            x_scales=scales,
            residual=residual,
            act=act,
            gated=node.op == "gated_linear",
        )

    return call


def _norm(low: Lowering, node: Node, sampled: bool) -> Call:
    x_name, out_name, eps = node.inputs[0], node.outputs[0], node.attrs["eps"]
    weight = low.floats(node.weights[0])
    plain = node.op.removesuffix("_quantize")

    def call(step: Step) -> str:
        count = step.count(sampled)
        x, out = low.get(x_name, count), low.get(out_name, count)
        if isinstance(out, Quantized):
            norm.rms_norm_quantize(out.data, out.scales, x, weight, eps, node.attrs["scale"])
            return "rms_norm_quantize"
        if node.op == "rms_norm_add":
            norm.rms_norm_add(out, x, low.get(node.inputs[1], count), weight, eps)
        elif plain == "layer_norm":
            norm.layer_norm(out, x, weight, low.floats(node.weights[1]), eps)
        else:
            norm.rms_norm(out, x, weight, eps)
        return node.op if node.op == "rms_norm_add" else plain

    return call


def _embed(low: Lowering, node: Node, sampled: bool) -> Call:
    table, scale = low.weights[node.weights[0]], node.attrs["scale"]

    def call(step: Step) -> str:
        out = low.get(node.outputs[0], step.count(sampled))
        ids = step.batch.positions if node.inputs[0] == "positions" else step.ids
        if table.format in ("f32", "f16", "bf16"):
            embed.embed(out, ids, table.data, scale)
            return f"embed_{table.format}"
        assert table.scales is not None
        embed.embed_packed(
            out, ids, table.data, table.scales, table.zeros,
            format=table.format, group=table.group, scale=scale,
        )  # fmt: skip
        return f"embed_{table.stored}"

    return call


def _qkv_write(low: Lowering, node: Node, sampled: bool) -> Call:
    group, layer = low.layers[node.attrs["layer"]]
    attrs = node.attrs
    rotary, normed = attrs["magnitude"] is not None, attrs["eps"] is not None
    names = list(node.weights)
    options: dict[str, Any] = {}
    if rotary:
        options |= {"inv_freq": low.floats(names.pop(0)), "magnitude": attrs["magnitude"]}
    if normed:
        options |= {"q_norm": low.floats(names[0]), "k_norm": low.floats(names[1]), "eps": attrs["eps"]}

    def call(step: Step) -> str:
        count = step.count(sampled)
        kv_write.qkv_write(
            low.get(node.outputs[0], count),
            low.get(node.inputs[0], count),
            layer,
            step.batch,
            group,
            heads=attrs["heads"],
            kv_heads=attrs["kv_heads"],
            head_dim=attrs["head_dim"],
            **options,
        )
        return "qkv_write"

    return call


def _kv_write(low: Lowering, node: Node, sampled: bool) -> Call:
    group, layer = low.layers[node.attrs["layer"]]

    def call(step: Step) -> str:
        keys, values = (low.get(name, step.count(sampled)) for name in node.inputs)
        kv_write.kv_write(keys, values, layer, step.batch, group, head_dim=node.attrs["head_dim"])
        return "kv_write"

    return call


def _rope(low: Lowering, node: Node, sampled: bool) -> Call:
    frequencies = low.floats(node.weights[0])

    def call(step: Step) -> str:
        count = step.count(sampled)
        x, out = low.get(node.inputs[0], count), low.get(node.outputs[0], count)
        size, magnitude = node.attrs["head_dim"], node.attrs["magnitude"]
        kv_write.rope(out, x, step.batch.positions, frequencies, size, magnitude)
        return "rope"

    return call


def _attention(low: Lowering, node: Node, sampled: bool) -> Call:
    attrs = node.attrs
    group, layer = low.layers[attrs["layer"]]

    def call(step: Step) -> str:
        count = step.count(sampled)
        attention.attention(
            low.get(node.outputs[0], count),
            low.get(node.inputs[0], count),
            layer,
            step.batch,
            group,
            heads=attrs["heads"],
            kv_heads=layer.keys.shape[2],
            head_dim=attrs["head_dim"],
            scale=attrs["scale"],
            softcap=attrs["softcap"],
            window=attrs["window"],
            scratch=low.scratch,
        )
        return "flash_attention"

    return call


def _experts(low: Lowering, node: Node, sampled: bool) -> Call:
    gate, up, down = (low.weights[name] for name in node.weights)

    def call(step: Step) -> str:
        x, ids, gains = (low.get(name, step.count(sampled)) for name in node.inputs)
        out = low.get(node.outputs[0], step.count(sampled))
        return experts.experts(out, x, ids, gains, (gate, up, down), act=node.attrs["act"])

    return call


def _rows(low: Lowering, node: Node, sampled: bool) -> Call:
    def call(step: Step) -> str:
        out, x = low.get(node.outputs[0], step.count(True)), low.get(node.inputs[0], step.count(False))
        embed.take_rows(out, x, step.rows)
        return "take_rows"

    return call


def _columns(low: Lowering, node: Node, sampled: bool) -> Call:
    order = low.weights[node.weights[0]].data.to(torch.int32)

    def call(step: Step) -> str:
        count = step.count(sampled)
        embed.take_columns(low.get(node.outputs[0], count), low.get(node.inputs[0], count), order)
        return "take_columns"

    return call


def _route(low: Lowering, node: Node, sampled: bool) -> Call:
    def call(step: Step) -> str:
        count = step.count(sampled)
        ids, gains = (low.get(name, count) for name in node.outputs)
        logits = low.get(node.inputs[0], count)
        routing.top_k_experts(ids, gains, logits, node.attrs["k"], node.attrs["renormalise"])
        return "top_k_experts"

    return call


def _elementwise(run: Callable[..., None], *attrs: str) -> Callable[[Lowering, Node, bool], Call]:
    def make(low: Lowering, node: Node, sampled: bool) -> Call:
        options: Sequence[Any] = [node.attrs[name] for name in attrs]

        def call(step: Step) -> str:
            count = step.count(sampled)
            run(low.get(node.outputs[0], count), *(low.get(name, count) for name in node.inputs), *options)
            return node.op

        return call

    return make


_MAKERS: dict[str, Callable[[Lowering, Node, bool], Call]] = {
    "embed": _embed,
    "rms_norm": _norm,
    "rms_norm_add": _norm,
    "rms_norm_quantize": _norm,
    "layer_norm": _norm,
    "layer_norm_quantize": _norm,
    "qkv_write": _qkv_write,
    "kv_write": _kv_write,
    "rope": _rope,
    "attention": _attention,
    "experts": _experts,
    "take_rows": _rows,
    "take_columns": _columns,
    "top_k_experts": _route,
    "act_mul": _elementwise(elementwise.act_mul, "act"),
    "activation": _elementwise(elementwise.activation, "act"),
    "add": _elementwise(elementwise.add),
    "scale": _elementwise(elementwise.scale, "factor"),
    "softcap": _elementwise(elementwise.softcap, "cap"),
}
