"""Magnitude, Wanda and SparseGPT on one matrix."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.compress.hessian import Hessian, damped, inverse_cholesky
from gossamer.compress.prune.magnitude import magnitude
from gossamer.compress.prune.masks import best_of_groups
from gossamer.compress.prune.parts import taken_over
from gossamer.compress.prune.sparsegpt import refine, sparsegpt
from gossamer.compress.prune.wanda import wanda

SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 40))


def problem(n: int, k: int, tokens: int = 200, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix and the mean of x x^T of inputs that hang together."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, k, generator=generator) @ torch.randn(k, k, generator=generator)
    hessian = Hessian(k)
    hessian.add(inputs)
    return torch.randn(n, k, generator=generator), hessian.mean()


def lost(weight: torch.Tensor, pruned: torch.Tensor, hessian: torch.Tensor) -> float:
    difference = weight - pruned
    return float(((difference @ hessian) * difference).sum())


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.sampled_from([0.0, 0.1, 0.5, 0.75, 0.9]), st.integers(1, 9))
def test_as_many_weights_go_as_were_asked(shape: tuple[int, int], sparsity: float, block: int) -> None:
    weight, hessian = problem(*shape)
    inverse = inverse_cholesky(hessian, 0.01)
    gone = round(Fraction(str(sparsity)) * weight.numel())
    for pruned in (
        magnitude(weight, sparsity),
        wanda(weight, hessian.diagonal().sqrt(), sparsity),
        sparsegpt(weight, inverse, sparsity, block=block),
    ):
        assert (pruned == 0).sum() == gone


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.sampled_from([(1, 2), (2, 4), (3, 4), (4, 8)]), st.integers(1, 9))
def test_no_more_stay_of_neighbours_than_the_pattern_says(
    shape: tuple[int, int], pattern: tuple[int, int], block: int
) -> None:
    weight, hessian = problem(*shape)
    inverse = inverse_cholesky(hessian, 0.01)
    for pruned in (
        magnitude(weight, 0.5, pattern),
        wanda(weight, hessian.diagonal().sqrt(), 0.5, pattern),
        sparsegpt(weight, inverse, 0.5, pattern, block=block),
    ):
        for row in pruned != 0:
            for group in row.split(pattern[1]):
                assert int(group.sum()) == min(pattern[0], len(group))


def test_magnitude_and_wanda_keep_the_largest() -> None:
    weight = torch.tensor([[1.0, -4.0, 2.0, 3.0], [-8.0, 7.0, 5.0, 6.0]])
    assert magnitude(weight, 0.5).count_nonzero(1).tolist() == [0, 4]
    inputs = torch.tensor([9.0, 1.0, 1.0, 0.1])
    assert wanda(weight, inputs, 0.5).tolist() == [[1.0, -4.0, 0.0, 0.0], [-8.0, 7.0, 0.0, 0.0]]
    kept = best_of_groups(weight.abs(), (1, 3))  # the last input of a row stands alone
    assert kept.tolist() == [[False, True, False, True], [True, False, False, True]]


def test_sparsegpt_loses_less_than_masks_and_refinement_the_least_there_is() -> None:
    weight, hessian = problem(16, 48)
    moments = damped(hessian, 0.01)
    by_wanda = wanda(weight, hessian.diagonal().sqrt(), 0.5)
    sparse = sparsegpt(weight, inverse_cholesky(hessian, 0.01), 0.5, block=16)
    refined = refine(weight, sparse, moments, 200)
    assert torch.equal(refined == 0, sparse == 0)
    assert lost(weight, sparse, moments) < 0.7 * lost(weight, by_wanda, moments)
    best = torch.zeros_like(weight)
    for row, keep in enumerate(sparse != 0):
        solved = torch.linalg.solve(moments[keep][:, keep].double(), (moments[keep] @ weight[row]).double())
        best[row, keep] = solved.float()
    torch.testing.assert_close(refined, best, rtol=1e-3, atol=1e-3)
    assert lost(weight, refined, moments) < 0.97 * lost(weight, sparse, moments)
    assert torch.equal(refine(weight, sparse, moments, 0), sparse)


def test_sparsegpt_finds_the_best_mask_of_independent_inputs() -> None:
    """Where inputs do not hang together, nothing is made up for, and what goes is least weight times norm."""
    weight, _ = problem(1, 6)
    hessian = torch.diag(torch.tensor([1.0, 4.0, 9.0, 0.25, 2.0, 3.0]))
    pruned = sparsegpt(weight, inverse_cholesky(hessian, 1e-6), 0.5, block=6)
    costs = {
        gone: float((weight[0, list(gone)] ** 2 * hessian.diagonal()[list(gone)]).sum())
        for gone in itertools.combinations(range(6), 3)
    }
    assert tuple(torch.where(pruned[0] == 0)[0].tolist()) == min(costs, key=lambda gone: costs[gone])
    assert torch.equal(pruned[pruned != 0], weight[pruned != 0])


@pytest.mark.parametrize("columns", [[0, 2, 3], [1], list(range(8))])
def test_what_stays_takes_over_by_least_squares(columns: list[int]) -> None:
    weight, hessian = problem(5, 8)
    taken = taken_over(weight, hessian, torch.tensor(columns).numpy())
    moments = damped(hessian, 0.01).double()
    whole = torch.zeros(5, 8).double()
    whole[:, columns] = taken.double()
    slope = ((whole - weight) @ moments)[:, columns]  # no better weights of these columns: the slope is 0
    assert float(slope.abs().max()) < 1e-3 * float((weight.double() @ moments).abs().max())
