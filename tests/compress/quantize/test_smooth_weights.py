"""SmoothQuant's maths: outliers move, and one scale spans what costs least."""

from __future__ import annotations

import pytest
import torch

from gossamer.compress.quantize.smooth_weights import (
    SHARES,
    Sample,
    Smoothed,
    best_share,
    clipping_losses,
    round_static,
    smoothed,
)
from gossamer.graph.ops.formats import round_activations, round_weight

WEIGHT = torch.randn(48, 96, generator=torch.Generator().manual_seed(1))


def sample(outlier: float) -> Sample:
    x = torch.randn(400, 96, generator=torch.Generator().manual_seed(0))
    x[:, 3] *= outlier
    found = Sample(96, every=2)
    for part in x.split(100):
        found.add(part)
    torch.testing.assert_close(found.largest_K, x.abs().amax(0))
    assert len(found.tokens()) == 200
    return found


def loss(given: Sample, factors: torch.Tensor) -> float:
    x = given.tokens()
    seen, weight = round_activations(x / factors, "int8"), round_weight(WEIGHT * factors, "int8")
    return float((seen @ weight.T - x @ WEIGHT.T).square().sum())


@pytest.mark.parametrize("static", [False, True])
def test_an_outlier_moves_into_the_weights(static: bool) -> None:
    given = sample(outlier=100.0)
    factors, alpha = smoothed([Smoothed(WEIGHT, given, "int8", 0, static)], None, 96, None)
    assert alpha is not None and alpha > 0
    assert factors.argmax() == 3
    if not static:
        assert loss(given, factors) < 0.1 * loss(given, torch.ones(96))


def test_a_given_alpha_is_the_papers_formula() -> None:
    given = sample(outlier=100.0)
    factors, alpha = smoothed([Smoothed(WEIGHT, given, "int8", 0, False)], None, 96, 0.3)
    wanted = given.largest_K**0.3 / WEIGHT.abs().amax(0) ** 0.7
    assert alpha == 0.3
    torch.testing.assert_close(factors / factors[0], wanted / wanted[0])


def test_channels_without_activations_keep_their_weights() -> None:
    given = Sample(96, 1)
    given.add(torch.zeros(10, 96))
    factors, _ = smoothed([Smoothed(WEIGHT, given, "int8", 0, False)], None, 96, 0.5)
    assert torch.equal(factors, torch.ones(96))


def test_one_scale_spans_the_share_that_costs_least() -> None:
    x = torch.randn(5000, 32, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)
    importance = torch.ones(32)
    assert best_share(clipping_losses(x, importance, 3.0)) == 1.0
    x[0, 0] = 9.0  # one number alone is not worth steps three times as long
    whole = clipping_losses(x, importance, 9.0)
    assert best_share(whole) < 0.7
    parts = sum(clipping_losses(part, importance, 9.0) for part in x.split(1000))
    torch.testing.assert_close(parts, whole)
    i = SHARES.index(best_share(whole))
    scale = SHARES[i] * 9.0 / 127
    assert float(whole[i]) == pytest.approx(float((round_static(x, scale) - x).square().sum()), rel=1e-4)


def test_static_rounding_is_the_specifications() -> None:
    x = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(round_static(x, 0.013), round_activations(x, "int8", 0, 0.013))
    assert not round_static(x, 0.0).any()
