"""The choice of experts against its torch reference."""

from __future__ import annotations

import pytest
import torch

from gossamer.graph.ops.attention import KVState
from gossamer.graph.ops.base import OPS


def both(logits: torch.Tensor, k: int, renormalise: bool) -> tuple[tuple[torch.Tensor, ...], ...]:
    from gossamer.backends.cuda.kernels.routing import top_k_experts

    ids = torch.empty(len(logits), k, dtype=torch.int32, device=logits.device)
    weights = torch.empty(len(logits), k, dtype=logits.dtype, device=logits.device)
    top_k_experts(ids, weights, logits, k, renormalise)
    attrs = {"k": k, "renormalise": renormalise}
    return (ids, weights), OPS["top_k_experts"].reference(attrs, [logits], [], KVState([]))


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "experts", "k"), [(1, 1, 1), (3, 8, 2), (70, 8, 8), (5, 60, 4), (2, 600, 7)]
)
def test_top_k_experts(
    rows: int, experts: int, k: int, dtype: torch.dtype, renormalise: bool, device: torch.device
) -> None:
    torch.manual_seed(experts)
    logits = (torch.randn(rows, experts + 1, device=device) * 2).to(dtype)[:, :experts]
    (ids, weights), (wanted, shares) = both(logits, k, renormalise)
    assert torch.equal(ids, wanted)
    torch.testing.assert_close(weights, shares, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-7)


def test_the_lowest_of_equals_and_nan(device: torch.device) -> None:
    logits = torch.tensor(
        [[1.0, 3.0, 3.0, 1.0, 3.0], [0.0] * 5, [1.0, float("nan"), 2.0, 3.0, 4.0]], device=device
    )
    (ids, weights), (wanted, _) = both(logits, 4, True)
    assert torch.equal(ids[:2], wanted[:2]) and ids[0].tolist() == [1, 2, 4, 0]
    assert sorted(ids[2].tolist()) == sorted(set(ids[2].tolist())) and weights[2].isnan().all()
