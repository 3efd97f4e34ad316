"""Every op of the table: its shape rule, and that its torch definition is differentiable and right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from gossamer.errors import GraphError
from gossamer.graph.ir import Node, R, Shape, T, Weight
from gossamer.graph.ops import OPS, get_op
from gossamer.graph.weights import Tensor

ATTENTION: dict[str, Any] = {
    "layer": 0,
    "heads": 4,
    "head_dim": 6,
    "scale": 0.4,
    "window": None,
    "softcap": None,
}
INT8 = {"eps": 1e-5, "format": "int8", "group": 0, "scale": 0.0}
QKV = {"layer": 0, "heads": 4, "kv_heads": 1, "head_dim": 6, "magnitude": 1.1, "eps": 1e-5}


@dataclass(frozen=True)
class Call:
    """A legal use of an op: shapes of inputs and weights, attributes, and the outputs' signature."""

    inputs: tuple[Shape, ...]
    weights: tuple[tuple[int, ...], ...] = ()
    attrs: dict[str, Any] = field(default_factory=dict)
    gives: tuple[tuple[Shape, str], ...] = ()


H = (T, 24)
SAME = ((H, "f32"),)
CALLS: dict[str, Call] = {
    "activation": Call((H,), (), {"act": "gelu"}, SAME),
    "act_mul": Call((H, H), (), {"act": "silu"}, SAME),
    "add": Call((H, H), (), {}, SAME),
    "attention": Call((H, (T, 12)), (), ATTENTION, SAME),
    "embed": Call(((T,),), ((101, 24),), {"scale": 3.0}, SAME),
    "experts": Call((H, (T, 2), (T, 2)), ((5, 8, 24), (5, 8, 24), (5, 24, 8)), {"act": "silu"}, SAME),
    "gated_linear": Call((H,), ((7, 24), (7, 24), (7,), (7,)), {"act": "silu"}, (((T, 7), "f32"),)),
    "kv_write": Call(((T, 12), (T, 12)), (), {"layer": 0, "head_dim": 6}, (((T, 12), "kv"),)),
    "layer_norm": Call((H,), ((24,), (24,)), {"eps": 1e-5}, SAME),
    "linear": Call((H,), ((7, 24), (7,)), {}, (((T, 7), "f32"),)),
    "layer_norm_quantize": Call((H,), ((24,), (24,)), INT8, (((T, 24), "prepared"),)),
    "linear_act": Call((H,), ((7, 24), (7,)), {"act": "gelu"}, (((T, 7), "f32"),)),
    "linear_add": Call((H, (T, 7)), ((7, 24),), {}, (((T, 7), "f32"),)),
    "merged_linear": Call((H,), ((7, 24), (5, 24), (7,), (5,)), {"parts": 2}, (((T, 12), "f32"),)),
    "qkv_write": Call(((T, 36), (T,)), ((2,), (6,), (6,)), QKV, (((T, 24), "f32"), ((T, 6), "kv"))),
    "rms_norm": Call((H,), ((6,),), {"eps": 1e-5}, SAME),
    "rms_norm_add": Call((H, H), ((24,),), {"eps": 1e-5}, SAME),
    "rms_norm_quantize": Call((H,), ((24,),), INT8, (((T, 24), "prepared"),)),
    "rope": Call((H, (T,)), ((2,),), {"head_dim": 6, "magnitude": 1.1}, SAME),
    "scale": Call((H,), (), {"factor": -0.7}, SAME),
    "softcap": Call((H,), (), {"cap": 1.5}, SAME),
    "take_columns": Call((H,), ((24,),), {}, SAME),
    "take_rows": Call((H, (R,)), (), {}, (((R, 24), "f32"),)),
    "top_k_experts": Call(((T, 5),), (), {"k": 2, "renormalise": True}, (((T, 2), "i32"), ((T, 2), "f32"))),
}


def shapes(op: str, call: Call) -> Any:
    node = Node(op, tuple("x" * len(call.inputs)), ("y",), tuple("w" * len(call.weights)), call.attrs)
    weights = [Weight("w", shape, Tensor("w", shape)) for shape in call.weights]
    return get_op(op).shapes(node, list(call.inputs), weights)


def test_every_op_of_the_table_is_tested_here() -> None:
    assert set(CALLS) == set(OPS)


@pytest.mark.parametrize("op", CALLS)
def test_a_legal_call_has_the_declared_arity_attributes_and_signature(op: str) -> None:
    call, row = CALLS[op], OPS[op]
    assert row.inputs[0] <= len(call.inputs) <= row.inputs[1]
    assert row.weights[0] <= len(call.weights) <= row.weights[1]
    assert set(call.attrs) == row.attrs
    assert shapes(op, call) == call.gives
    assert row.doc


ILLEGAL: list[tuple[str, Call]] = [
    ("activation", Call((H,), (), {"act": "tanh"})),
    ("act_mul", Call((H, (T, 23)), (), {"act": "silu"})),
    ("add", Call((H, (R, 24)))),
    ("attention", Call((H, (T, 12)), (), {**ATTENTION, "heads": 3})),
    ("attention", Call((H, (T, 13)), (), ATTENTION)),
    ("attention", Call((H, (T, 18)), (), ATTENTION)),
    ("experts", Call((H, (T, 2), (T, 2)), ((5, 8, 24), (5, 8, 24), (5, 24, 9)), {"act": "silu"})),
    ("gated_linear", Call((H,), ((7, 24), (8, 24)), {"act": "silu"})),
    ("kv_write", Call(((T, 12), (T, 6)), (), {"layer": 0, "head_dim": 6})),
    ("layer_norm", Call((H,), ((6,), (6,)), {"eps": 1e-5})),
    ("layer_norm", Call((H,), ((24,), (6,)), {"eps": 1e-5})),
    ("linear", Call((H,), ((7, 23),))),
    ("linear", Call((H,), ((7, 24), (8,)))),
    ("linear_add", Call((H, (T, 8)), ((7, 24),))),
    ("linear_act", Call((H,), ((7, 24),), {"act": "tanh"})),
    ("merged_linear", Call((H,), ((7, 24), (5, 23)), {"parts": 2})),
    ("merged_linear", Call((H,), ((7, 24), (5, 24), (7,), (7,)), {"parts": 2})),
    ("qkv_write", Call(((T, 30), (T,)), ((2,), (6,), (6,)), QKV)),
    ("qkv_write", Call(((T, 36), (T,)), ((2,),), QKV)),
    ("qkv_write", Call(((T, 36), (T,)), ((4,), (6,), (6,)), QKV)),
    ("rms_norm_add", Call((H, (T, 23)), ((24,),), {"eps": 1e-5})),
    ("rms_norm_quantize", Call((H,), ((6,),), INT8)),
    ("rms_norm_quantize", Call((H,), ((24,),), {**INT8, "format": "f32"})),
    ("rms_norm", Call((H,), ((7,),), {"eps": 1e-5})),
    ("rope", Call((H, (T,)), ((4,),), {"head_dim": 6, "magnitude": 1.0})),
    ("rope", Call((H, (T,)), ((2,),), {"head_dim": 7, "magnitude": 1.0})),
    ("take_columns", Call((H,), ((23,),))),
    ("top_k_experts", Call(((T, 5),), (), {"k": 6, "renormalise": True})),
]


@pytest.mark.parametrize(("op", "call"), ILLEGAL, ids=[f"{op}-{i}" for i, (op, _) in enumerate(ILLEGAL)])
def test_an_illegal_call_is_refused_naming_the_op(op: str, call: Call) -> None:
    with pytest.raises(GraphError, match=f"{op}|activation"):
        shapes(op, call)


def test_an_unknown_op_is_named() -> None:
    with pytest.raises(GraphError, match="'multiply' is not in the table: act_mul, "):
        get_op("multiply")


TOKENS = 7


def tensors(op: str) -> tuple[list[Any], list[Any]]:
    """Random inputs and weights of a legal call; those that are floats want gradients."""
    import torch

    call, generator = CALLS[op], torch.Generator().manual_seed(3)

    def make(shape: tuple[Any, ...]) -> Any:
        extents = [TOKENS if dim in (T, R) else dim for dim in shape]
        return torch.randn(extents, generator=generator).requires_grad_()

    inputs, weights = [make(s) for s in call.inputs], [make(s) for s in call.weights]
    for i, shape in enumerate(call.inputs):
        if len(shape) == 1:
            inputs[i] = torch.arange(TOKENS, dtype=torch.int32)
    if op == "experts":
        inputs[1] = torch.stack([torch.randperm(5, generator=generator)[:2] for _ in range(TOKENS)]).int()
    if op == "take_columns":
        weights[0] = torch.randperm(24, generator=generator).float()
    if op == "attention":
        values = make((T, 2, 6))
        inputs[1] = (make((T, 2, 6)), values)
    return inputs, weights


def flat(values: list[Any]) -> list[Any]:
    import torch

    leaves = [x for value in values for x in (value if isinstance(value, tuple) else (value,))]
    return [x for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]


# Rounding to integers has no slope to compare with.
@pytest.mark.parametrize("op", [op for op in CALLS if not op.endswith("_quantize")])
def test_gradients_agree_with_finite_differences(op: str) -> None:
    torch = pytest.importorskip("torch")
    from gossamer.graph.ops.attention import KVState, SpanRows

    inputs, weights = tensors(op)
    kv = KVState((SpanRows(0, 0, TOKENS, 0),))

    def total() -> Any:
        outputs = OPS[op].reference(CALLS[op].attrs, inputs, weights, kv)
        floats = [x for o in outputs for x in (o if isinstance(o, tuple) else (o,)) if x.is_floating_point()]
        # Weighted, so that a sum that is constant (softmax) still has a gradient.
        return sum((x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in floats)

    leaves = flat(inputs) + flat(weights)
    total().backward()
    generator = torch.Generator().manual_seed(5)
    for leaf in leaves:
        assert leaf.grad is not None and leaf.grad.isfinite().all() and leaf.grad.any()
        direction = torch.randn(leaf.shape, generator=generator)
        direction /= direction.norm()
        there = []
        for step in (1e-2, -1e-2):
            with torch.no_grad():
                leaf += step * direction
                there.append(total().item())
                leaf -= step * direction
        slope = (there[0] - there[1]) / 2e-2
        assert slope == pytest.approx((leaf.grad * direction).sum().item(), rel=2e-2, abs=5e-3)


@pytest.mark.parametrize("window", [None, 3, TOKENS])
@pytest.mark.parametrize("softcap", [None, 0.8])
def test_attention_without_a_cache_equals_attention_through_one(
    window: int | None, softcap: float | None
) -> None:
    torch = pytest.importorskip("torch")
    from gossamer.graph.ops.attention import KVState, SpanRows

    attrs = {**ATTENTION, "window": window, "softcap": softcap}
    write: Callable[..., Any] = OPS["kv_write"].reference
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2 * TOKENS, width, generator=generator) for width in (24, 12, 12))
    spans = (SpanRows(0, 0, TOKENS, 0), SpanRows(1, TOKENS, TOKENS, 0))
    out = []
    for cache in (None, {}):
        kv = KVState(spans, cache)
        handle = write({"layer": 0, "head_dim": 6}, (k, v), (), kv)
        out.append(OPS["attention"].reference(attrs, (q, *handle), (), kv)[0])
    torch.testing.assert_close(out[0], out[1])


def test_a_span_that_skips_tokens_is_refused() -> None:
    torch = pytest.importorskip("torch")
    from gossamer.graph.ops.attention import KVState, SpanRows

    x = torch.zeros(2, 12)
    with pytest.raises(GraphError, match="sequence 4 starts at 5; its cache holds 0 tokens"):
        OPS["kv_write"].reference(
            {"layer": 0, "head_dim": 6}, (x, x), (), KVState((SpanRows(4, 0, 2, 5),), {})
        )


def test_routing_takes_the_lowest_expert_among_equals() -> None:
    torch = pytest.importorskip("torch")
    from gossamer.graph.ops.attention import KVState

    logits = torch.tensor([[1.0, 2.0, 2.0, 1.0]])
    ids, gains = OPS["top_k_experts"].reference({"k": 3, "renormalise": True}, (logits,), (), KVState(()))
    assert ids.tolist() == [[1, 2, 0]]
    assert gains.sum().item() == pytest.approx(1.0)
