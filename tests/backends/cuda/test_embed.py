"""Embedding tables and takers of rows and columns against torch and the specification of formats."""

from __future__ import annotations

import pytest
import torch

from gossamer.graph.ops.formats import NF4

TYPES = [torch.float32, torch.float16, torch.bfloat16]
IDS = [4, 0, 10, 4, 7]


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    """want: float32. The interpreter cuts bfloat16 off where a GPU rounds."""
    exact = got.dtype != torch.bfloat16
    torch.testing.assert_close(got, want.to(got.dtype), rtol=0 if exact else 2**-7, atol=0)


def table(columns: int, device: torch.device) -> torch.Tensor:
    torch.manual_seed(columns)
    return torch.randn(11, columns, device=device)


@pytest.mark.parametrize("columns", [1, 48, 1030])
@pytest.mark.parametrize("stored", TYPES)
@pytest.mark.parametrize("dtype", TYPES)
def test_embed(columns: int, stored: torch.dtype, dtype: torch.dtype, device: torch.device) -> None:
    from gossamer.backends.cuda.kernels.embed import embed

    weight, ids = table(columns, device).to(stored), torch.tensor(IDS, dtype=torch.int32, device=device)
    out = torch.empty(5, columns, dtype=dtype, device=device)
    embed(out, ids, weight, 2.5)
    same(out, weight[IDS].float() * 2.5)


@pytest.mark.parametrize("columns", [1, 33])
@pytest.mark.parametrize("dtype", TYPES)
def test_take_rows_and_columns(columns: int, dtype: torch.dtype, device: torch.device) -> None:
    from gossamer.backends.cuda.kernels.embed import take_columns, take_rows

    x = table(columns + 4, device).to(dtype)[:, :columns]
    out = torch.empty(5, columns, dtype=dtype, device=device)
    take_rows(out, x, torch.tensor(IDS, dtype=torch.int32, device=device))
    assert torch.equal(out, x[IDS])
    order = torch.randperm(columns, device=device)
    out = torch.empty(11, columns, dtype=dtype, device=device)
    take_columns(out, x, order.int())
    assert torch.equal(out, x[:, order])


@pytest.mark.parametrize("group", [0, 16])
@pytest.mark.parametrize("columns", [5, 48, 1030])
def test_embed_int8(columns: int, group: int, device: torch.device) -> None:
    from gossamer.backends.cuda.kernels.embed import embed_packed

    torch.manual_seed(0)
    codes = torch.randint(-127, 128, (11, columns), dtype=torch.int8, device=device)
    scales = (
        torch.rand(11, -(-columns // group), device=device).half() if group else torch.rand(11, device=device)
    )
    out = torch.empty(5, columns, device=device)
    embed_packed(out, torch.tensor(IDS, device=device), codes, scales, format="int8", group=group, scale=0.5)
    own = scales.float().repeat_interleave(group, 1)[:, :columns] if group else scales[:, None]
    assert torch.equal(out, (codes.float() * own)[IDS] * 0.5)


@pytest.mark.parametrize("format", ["int4", "uint4", "nf4"])
@pytest.mark.parametrize(("columns", "group"), [(6, 4), (45, 16), (1100, 128)])
@pytest.mark.parametrize("dtype", TYPES)
def test_embed_four_bits(
    columns: int, group: int, format: str, dtype: torch.dtype, device: torch.device
) -> None:
    from gossamer.backends.cuda.kernels.embed import embed_packed

    torch.manual_seed(0)
    padded, groups = columns + columns % 2, -(-columns // group)
    integers = torch.randint(0, 16, (11, padded), dtype=torch.uint8, device=device)
    codes = integers[:, ::2] | integers[:, 1::2] << 4
    scales = torch.rand(11, groups, device=device).half()
    zeros = torch.randint(0, 16, (11, groups), dtype=torch.uint8, device=device)
    out = torch.empty(5, columns, dtype=dtype, device=device)
    ids = torch.tensor(IDS, dtype=torch.int32, device=device)
    given = zeros if format == "uint4" else None
    embed_packed(out, ids, codes, scales, given, format=format, group=group, scale=1.5)
    if format == "nf4":
        levels = torch.tensor(NF4, dtype=torch.float32, device=device)[integers.long()]
    else:
        levels = integers.float()
        levels -= 8.0 if format == "int4" else zeros.float().repeat_interleave(group, 1)[:, :padded]
    want = (levels * scales.float().repeat_interleave(group, 1)[:, :padded])[IDS, :columns] * 1.5
    same(out, want)
