"""Codes of round-to-nearest are what quantization at load makes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.compress.quantize import rounding
from gossamer.compress.quantize.rounding import LEVELS, grid_of, round_to_nearest, searched_grid, stored_bytes
from gossamer.config.quantization import GROUPS
from gossamer.graph.ops.formats import round_weight

WRITTEN = [("int8", 0), *((f, g) for f in LEVELS for g in GROUPS[f])]


@pytest.mark.parametrize(("format", "group"), WRITTEN)
@settings(max_examples=6, deadline=None)
@given(n=st.integers(1, 20), k=st.integers(1, 300), seed=st.integers(0, 99), zeros=st.booleans())
def test_values_are_those_of_round_weight(
    format: str, group: int, n: int, k: int, seed: int, zeros: bool
) -> None:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    if zeros:
        weight[:, : k // 2] = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounding, "_ROWS", 3 * k)  # several stretches of rows
        codes = round_to_nearest(weight, format, group)
    low, high = LEVELS[format]
    assert low <= codes.codes.min() and codes.codes.max() <= high
    np.testing.assert_array_equal(codes.floats(), round_weight(weight, format, group).numpy())
    if group:
        np.testing.assert_array_equal(codes.scales, codes.scales.astype(np.float16))


@pytest.mark.parametrize(("format", "group"), WRITTEN)
def test_a_grid_gives_back_what_lies_on_it(format: str, group: int) -> None:
    weight = torch.randn(5, 200, generator=torch.Generator().manual_seed(1))
    grid = grid_of(weight, format, group)
    codes = grid.codes(weight)
    assert torch.equal(grid.codes(grid.values(codes)), codes)
    np.testing.assert_array_equal(grid.stored(codes).floats(), grid.values(codes).numpy())


@pytest.mark.parametrize(("format", "group"), WRITTEN)
def test_searched_scales_lose_no_more_in_any_group(format: str, group: int) -> None:
    weight = torch.randn(20, 256, generator=torch.Generator().manual_seed(1))

    def losses(grid: rounding.Grid) -> torch.Tensor:
        error = (weight - grid.values(grid.codes(weight))).abs().pow(2.4)
        return error.reshape(20, -1, group or 256).sum(-1)

    plain, searched = grid_of(weight, format, group), searched_grid(weight, format, group)
    assert (losses(searched) <= losses(plain)).all()
    assert torch.equal(searched.scales, searched.scales.half().float()) or not group
    if format in ("int4", "uint4"):
        assert losses(searched).sum() < 0.97 * losses(plain).sum()


def test_bytes_of_what_is_stored() -> None:
    assert stored_bytes("int8", 0, (3, 10)) == 3 * 14
    assert stored_bytes("int4", 32, (3, 64)) == 3 * (32 + 2 * 2)
    assert stored_bytes("uint4", 32, (2, 3, 64)) == 6 * (32 + 2 * 2) + 6
    assert stored_bytes("int8", 32, (1, 40)) == 40 + 2 * 2
