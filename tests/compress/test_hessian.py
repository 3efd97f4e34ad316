"""Hessians of a block's inputs, and the factor of their inverse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.checkpoint.weights import DummySource
from gossamer.compress.blocks import Blocks
from gossamer.compress.hessian import Hessian, collect, inverse_cholesky
from gossamer.errors import ConfigError
from tests.compress.test_blocks import WINDOWS, graph_of


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 24), st.integers(1, 60), st.integers(0, 2**31), st.floats(1e-3, 1.0))
def test_the_factor_is_upper_and_gives_the_inverse(
    width: int, tokens: int, seed: int, damping: float
) -> None:
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
    h = Hessian(width)
    for part in (x[i : i + 7] for i in range(0, tokens, 7)):
        h.add(part)
    assert h.tokens == tokens
    upper = inverse_cholesky(h.mean(), damping).double()
    assert torch.equal(upper, upper.triu())
    damped = h.mean().double()
    damped += damping * damped.diagonal().mean() * torch.eye(width)
    torch.testing.assert_close(damped @ (upper.T @ upper), torch.eye(width).double(), rtol=0, atol=1e-3)


def test_columns_that_are_always_zero_stand_alone() -> None:
    x = torch.randn(50, 6)
    x[:, [1, 4]] = 0
    h = Hessian(6)
    h.add(x)
    upper = inverse_cholesky(h.mean(), 0.01)
    alive = [0, 2, 3, 5]
    for dead in (1, 4):
        assert upper[dead].count_nonzero() == upper[:, dead].count_nonzero() == 1
        assert upper[dead, dead] == upper.max()  # a weight there is the cheapest to lose
    whole = inverse_cholesky(h.mean()[alive][:, alive], 0.01)
    torch.testing.assert_close(upper[alive][:, alive], whole)
    torch.testing.assert_close(inverse_cholesky(torch.zeros(3, 3), 0.01), 10 * torch.eye(3))


def test_a_matrix_that_is_none_of_moments_is_refused() -> None:
    h = torch.tensor([[1.0, 1e9], [1e9, 1.0]])
    with pytest.raises(ConfigError, match="damping"):
        inverse_cholesky(h, 0.01)


def test_more_damping_is_tried_before_giving_up() -> None:
    h = torch.tensor([[1.0, 1.05], [1.05, 1.0]])
    assert torch.isfinite(inverse_cholesky(h, 0.01)).all()


def test_every_site_of_a_block_has_one() -> None:
    graph, mixtures = graph_of("qwen3_moe"), 0
    for block in Blocks(graph, DummySource(graph), WINDOWS):
        found = collect(block)
        assert list(found) == list(block.sites())
        tokens = {site.plane: 0 for site in found}
        for site, hessian in found.items():
            tokens[site.plane] += hessian.tokens
            assert hessian.mean().shape[0] == block.matrix(site.matrices[0], site.plane).shape[1]
        if any(node.op == "experts" for node in block.block.nodes):
            mixtures += 1
            # Every token goes to three of the experts, and each is seen before and behind the gate.
            routed = sum(n for plane, n in tokens.items() if plane is not None)
            assert routed == 2 * 3 * np.prod(WINDOWS.shape)
    assert mixtures
