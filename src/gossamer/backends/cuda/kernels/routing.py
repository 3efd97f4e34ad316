"""top_k_experts (Shazeer et al. 2017): which experts a token goes to, and with what weights."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["top_k_experts"]

_TILE = 512  # logits that one program takes at least


@triton.jit(do_not_specialize=["rows"])
def _top_k_experts_kernel(
    ids_out, weights_out, logits, rows, experts, stride,
    K: tl.constexpr, RENORMALISE: tl.constexpr,
    ROWS: tl.constexpr, EXPERTS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    expert = tl.arange(0, EXPERTS)[None, :]
    there = (row < rows) & (expert < experts)
    x = tl.load(logits + row.to(tl.int64) * stride + expert, mask=there, other=float("-inf")).to(tl.float32)
    x = tl.where(row < rows, x, 0.0)
    powers = tl.exp(x - tl.max(x, 1, keep_dims=True))
    shares = powers / tl.sum(powers, 1, keep_dims=True)
    # What is left to choose from; of NaN, which compares with nothing, the lowest ids.
    left = tl.where(expert < experts, tl.where(shares == shares, shares, 0.0), -1.0)
    slot = tl.arange(0, SLOTS)[None, :]
    ids = tl.zeros([ROWS, SLOTS], tl.int32)
    weights = tl.zeros([ROWS, SLOTS], tl.float32)
    for taken in range(K):
        best = tl.max(left, 1, keep_dims=True)
        chosen = tl.min(tl.where(left == best, expert, EXPERTS), 1, keep_dims=True)
        share = tl.sum(tl.where(expert == chosen, shares, 0.0), 1, keep_dims=True)
        ids = tl.where(slot == taken, chosen, ids)
        weights = tl.where(slot == taken, share, weights)
        left = tl.where(expert == chosen, -1.0, left)
    if RENORMALISE:
        weights = weights / tl.sum(weights, 1, keep_dims=True)
    to = row.to(tl.int64) * K + slot
    tl.store(ids_out + to, ids, mask=(row < rows) & (slot < K))
    tl.store(weights_out + to, weights, mask=(row < rows) & (slot < K))


def top_k_experts(
    ids_out: torch.Tensor, weights_out: torch.Tensor, logits: torch.Tensor, k: int, renormalise: bool
) -> None:
    """The k largest of softmax(logits), largest first and the lowest id among equals; renormalise: divided by
    their sum. A row with a NaN goes to some experts with weights of NaN.

    ids_out: int32 [T, k]; weights_out: float [T, k], both contiguous; logits: float [T, E], 1 <= k <= E.
    """
    rows, experts = logits.shape
    block = max(triton.next_power_of_2(experts), 16)
    each = max(1, _TILE // block)
    _top_k_experts_kernel[(triton.cdiv(rows, each),)](
        ids_out, weights_out, logits, rows, experts, logits.stride(0),
        K=k, RENORMALISE=renormalise, ROWS=each, EXPERTS=block, SLOTS=triton.next_power_of_2(k),
        num_warps=min(max(block * each // 256, 1), 8),
    )  # fmt: skip
