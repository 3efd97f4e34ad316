"""GPTQ's maths: what it minimises, and that it stays on a grid."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch

from gossamer.checkpoint.codes import Codes
from gossamer.compress.quantize.gptq_weights import ActOrder, gptq, output_error
from gossamer.compress.quantize.rounding import LEVELS, round_to_nearest
from tests.compress.quantize.test_rounding import WRITTEN

ORDERS: tuple[ActOrder, ...] = get_args(ActOrder)


def inputs(k: int, seed: int = 0) -> torch.Tensor:
    """Tokens whose channels depend on each other, some of them much larger than others."""
    random = torch.Generator().manual_seed(seed)
    mixed = torch.randn(2000, k, generator=random) @ torch.randn(k, k, generator=random)
    return mixed * torch.rand(k, generator=random) ** 3


def second_moment(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x / len(x)


def values(codes: Codes) -> torch.Tensor:
    return torch.from_numpy(codes.floats())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("format", "group"), WRITTEN)
def test_outputs_are_nearer_than_rounding_s(format: str, group: int, order: ActOrder) -> None:
    weight = torch.randn(24, 300, generator=torch.Generator().manual_seed(1))
    hessian = second_moment(inputs(300))
    codes = gptq(weight, hessian, format, group, act_order=order)
    low, high = LEVELS[format]
    assert low <= codes.codes.min() and codes.codes.max() <= high
    if group:
        np.testing.assert_array_equal(codes.scales, codes.scales.astype(np.float16))
    rounded = output_error(weight, values(round_to_nearest(weight, format, group)), hessian)
    assert output_error(weight, values(codes), hessian) < 0.75 * rounded


def test_the_output_error_is_that_of_the_tokens() -> None:
    x, weight = inputs(40), torch.randn(8, 40, generator=torch.Generator().manual_seed(1))
    other = values(round_to_nearest(weight, "int4", 32))
    direct = ((x @ (weight - other).T).square().sum() / (x @ weight.T).square().sum()).item()
    assert output_error(weight, other, second_moment(x)) == pytest.approx(direct, rel=1e-4)


def test_the_order_by_inputs_helps_where_they_differ() -> None:
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(1))
    hessian = second_moment(inputs(256))
    error = {
        order: output_error(weight, values(gptq(weight, hessian, "int4", 64, act_order=order)), hessian)
        for order in ORDERS
    }
    assert error["weight"] < error["group"] < error["none"]


@pytest.mark.parametrize("order", ORDERS)
def test_inputs_without_any_relation_are_rounded_to_nearest(order: ActOrder) -> None:
    weight = torch.randn(6, 100, generator=torch.Generator().manual_seed(1))
    codes = gptq(weight, torch.diag(torch.linspace(0.1, 1.1, 100)), "int4", 32, act_order=order, search=False)
    np.testing.assert_array_equal(codes.floats(), round_to_nearest(weight, "int4", 32).floats())


@pytest.mark.parametrize("order", ORDERS)
def test_inputs_that_never_came_are_rounded_to_nearest(order: ActOrder) -> None:
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(1))
    nearest = round_to_nearest(weight, "int4", 32)
    codes = gptq(weight, torch.zeros(96, 96), "int4", 32, act_order=order, search=False)
    np.testing.assert_array_equal(codes.floats(), nearest.floats())
    x = inputs(96)
    x[:, 32:64] = 0
    some = gptq(weight, second_moment(x), "int4", 32, act_order=order, search=False)
    np.testing.assert_array_equal(some.floats()[:, 32:64], nearest.floats()[:, 32:64])
    assert (some.floats() != nearest.floats()).any()


@pytest.mark.parametrize("order", ORDERS)
def test_fewer_tokens_than_inputs_still_calibrate(order: ActOrder) -> None:
    weight = torch.randn(6, 192, generator=torch.Generator().manual_seed(1))
    x = inputs(192)[:3]
    codes = gptq(weight, second_moment(x), "int8", 0, act_order=order)
    assert np.isfinite(codes.floats()).all()
    nearest = round_to_nearest(weight, "int8", 0)
    assert output_error(weight, values(codes), second_moment(x)) < output_error(
        weight, values(nearest), second_moment(x)
    )


def test_blocks_of_columns_are_an_order_of_the_same_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Updates put off to the end of a block give what updates at once give."""
    weight = torch.randn(16, 300, generator=torch.Generator().manual_seed(1))
    hessian = second_moment(inputs(300))
    lazy = gptq(weight, hessian, "int4", 32)
    monkeypatch.setattr("gossamer.compress.quantize.gptq_weights._BLOCK", 1024)
    at_once = gptq(weight, hessian, "int4", 32)
    assert (lazy.codes != at_once.codes).mean() < 0.002  # ties that float sums break otherwise
