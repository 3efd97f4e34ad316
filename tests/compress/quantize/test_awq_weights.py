"""AWQ's searches: what they minimise, and that they never do worse than rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gossamer.compress.quantize.awq_weights import Reader, best_factors, clipped_grid
from gossamer.compress.quantize.gptq_weights import output_error
from gossamer.compress.quantize.rounding import Grid, grid_of

FORMATS = [("int4", 32), ("int4", 128), ("uint4", 64), ("int8", 32), ("int8", 0)]


def inputs(k: int, outliers: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(k)
    x = torch.randn(500, k, generator=random) @ torch.randn(k, k, generator=random)
    x[:, :outliers] *= 30
    return x


def values(grid: Grid, weight: torch.Tensor) -> torch.Tensor:
    return grid.values(grid.codes(weight))


@pytest.mark.parametrize(("format", "group"), FORMATS)
def test_clipped_ranges_cost_each_group_no_more_than_its_own(format: str, group: int) -> None:
    weight = torch.randn(40, 150, generator=torch.Generator().manual_seed(0)) ** 3
    x = inputs(150)
    grid = clipped_grid(weight, x.T @ x, format, group)
    plain = grid_of(weight, format, group)
    if group:
        np.testing.assert_array_equal(grid.scales, grid.scales.half().float())
    for start in range(0, 150, group or 150):
        part = slice(start, start + (group or 150))
        clipped, own = (
            ((values(g, weight) - weight)[:, part] @ x[:, part].T).square().sum(-1) for g in (grid, plain)
        )
        assert (clipped <= own * (1 + 1e-3)).all()
    errors = [output_error(weight, values(g, weight), x.T @ x) for g in (grid, plain)]
    assert errors[0] <= (0.97 if group and format != "int8" else 1.001) * errors[1]


def test_inputs_that_never_came_leave_ranges_alone() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    grid = clipped_grid(weight, torch.zeros(64, 64), "int4", 32)
    assert torch.equal(grid.scales, grid_of(weight, "int4", 32).scales)


def test_channels_of_large_inputs_are_scaled_up() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    x = inputs(128, outliers=2)
    factors, exponent = best_factors([Reader(weight, x.T @ x, "int4", 128)], None, 128, 20)
    assert exponent > 0
    assert factors[:2].min() > factors[2:].max()
    scaled = values(grid_of(weight * factors, "int4", 128), weight * factors) / factors
    plain = values(grid_of(weight, "int4", 128), weight)
    assert output_error(weight, scaled, x.T @ x) < 0.6 * output_error(weight, plain, x.T @ x)


def test_channels_that_share_a_factor_get_one() -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    x = inputs(64, outliers=2)
    shared = [i % 32 for i in range(64)]
    factors, _ = best_factors([Reader(weight, x.T @ x, "int4", 32)], shared, 32, 20)
    assert factors.shape == (32,)
    assert factors[:2].min() > factors[2:].max()


def test_floats_ask_for_no_factors() -> None:
    weight, x = torch.randn(8, 64), inputs(64, outliers=2)
    assert best_factors([Reader(weight, x.T @ x, "f32", 0)], None, 64, 20)[1] == 0.0
