"""Rotary, head norms and the writing of pages against the torch references of the ops."""

from __future__ import annotations

import pytest
import torch

from gossamer.backends.cuda.kernels.kv_write import kv_write, qkv_write, rope
from gossamer.graph.ops import get_op
from gossamer.graph.ops.attention import KVState
from gossamer.graph.ops.formats import round_kv
from tests.backends.cuda.steps import FORMATS, MOST, make_layer, make_step, stored

SPANS = ((1, 40), (9, 0), (3, 15), (1, 0))
# The interpreter cuts to bfloat16 where hardware rounds: a unit in the last place.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
STEPS = {"f32": 0.0, "f16": 1e-3, "bf16": 8e-3, "int8": 0.0, "fp8": 0.0}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(got.float(), want.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rotary", "normed"),
    [
        (4, 2, 16, 8, True),
        (5, 1, 24, 12, False),
        (7, 7, 8, 3, True),
        (6, 2, 80, 16, True),
        (2, 1, 64, 0, False),
    ],
)
def test_qkv_write(
    device: torch.device,
    format: str,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rotary: int,
    normed: bool,
) -> None:
    step = make_step(device, SPANS, groups=2)
    layer = make_layer(device, step, kv_heads, head_dim, format)
    width = (heads + 2 * kv_heads) * head_dim
    qkv = random(step.rows, width).to(device, dtype)
    inv_freq = random(rotary, seed=1).abs().to(device) if rotary else None
    norms = [1 + random(head_dim, seed=s).to(device) for s in (2, 3)] if normed else [None, None]
    magnitude, eps = 1.25 if rotary else None, 1e-5 if normed else None
    out = torch.full((step.rows, heads * head_dim), torch.nan, dtype=dtype, device=device)
    qkv_write(
        out, qkv, layer, step.batch, 1, heads=heads, kv_heads=kv_heads, head_dim=head_dim, inv_freq=inv_freq,
        magnitude=magnitude, q_norm=norms[0], k_norm=norms[1], eps=eps,
    )  # fmt: skip

    attrs = {
        "layer": 0, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "magnitude": magnitude,
        "eps": eps,
    }  # fmt: skip
    weights = [w for w in (inv_freq, *norms) if w is not None]
    inputs = [qkv.float(), step.batch.positions]
    q, (k, v) = get_op("qkv_write").reference(attrs, inputs, weights, KVState(step.spans))
    close(out, q, TOLERANCES[dtype])
    for i, span in enumerate(step.spans):
        rows = slice(span.row, span.row + span.count)
        got = [x[span.start :] for x in stored(layer, step, i, 1)]
        for x, want in zip(got, (k, v), strict=True):
            # Of int8 and fp8 the one code that a rounding error in float32 may move.
            unit = (
                float(want[rows].abs().max()) / {"int8": 127, "fp8": 14}[format] if format in MOST else 2e-6
            )
            torch.testing.assert_close(x, round_kv(want[rows], format), rtol=STEPS[format], atol=1.01 * unit)
            if format in MOST:
                off = (x - round_kv(want[rows], format)).abs() > 1e-5
                assert off.float().mean() < 0.02


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("page_size", [16, 48])
def test_kv_write_touches_its_slots_alone(device: torch.device, format: str, page_size: int) -> None:
    step = make_step(device, SPANS, page_size=page_size)
    layer = make_layer(device, step, 3, 40, format, page_size)
    k, v = (random(step.rows, 120, seed=s).to(device) for s in (0, 1))
    k[1] = 0.0  # a scale of zero
    kv_write(k, v, layer, step.batch, 0, head_dim=40)
    for i, span in enumerate(step.spans):
        rows = slice(span.row, span.row + span.count)
        for x, want in zip(stored(layer, step, i), (k, v), strict=True):
            rounded = round_kv(want[rows].reshape(-1, 3, 40), format)
            torch.testing.assert_close(x[span.start :], rounded, rtol=STEPS[format], atol=1e-6)
    marks = layer.keys[..., 0] if layer.key_scales is None else layer.key_scales
    assert torch.equal((~marks.isnan()).sum((0, 1)).cpu(), torch.full((3,), step.rows))


def test_trees_stand_in_slots_and_turn_by_positions(device: torch.device) -> None:
    step = make_step(device, [(2, 3), (5, 20)], trees={1: (-1, 0, 0, -1, 3)})
    layer = make_layer(device, step, 1, 16, "f32")
    qkv, inv_freq = random(7, 48).to(device), random(8, seed=1).to(device)
    out = torch.empty(7, 16, device=device)
    qkv_write(
        out, qkv, layer, step.batch, 0, heads=1, kv_heads=1, head_dim=16, inv_freq=inv_freq, magnitude=1.0
    )
    attrs = {"head_dim": 16, "magnitude": 1.0}
    (k,) = get_op("rope").reference(attrs, [qkv[:, 16:32], step.batch.positions], [inv_freq], KVState(()))
    close(stored(layer, step, 1)[0][20:, 0], k[2:], 2e-6)
    assert torch.equal(stored(layer, step, 1)[1][20:, 0], qkv[2:, 32:])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("heads", "head_dim", "rotary"), [(3, 16, 8), (33, 8, 2), (2, 96, 40)])
def test_rope(device: torch.device, dtype: torch.dtype, heads: int, head_dim: int, rotary: int) -> None:
    x = random(5, heads * head_dim).to(device, dtype)
    positions = torch.tensor([0, 3, 90_000, 17, 1], dtype=torch.int32, device=device)
    inv_freq = (0.01 * random(rotary, seed=1).abs()).to(device)
    attrs = {"head_dim": head_dim, "magnitude": 0.5}
    (want,) = get_op("rope").reference(attrs, [x.float(), positions], [inv_freq], KVState(()))
    rope(x, x, positions, inv_freq, head_dim, 0.5)  # in place
    close(x, want, TOLERANCES[dtype])
