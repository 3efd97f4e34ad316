"""GPTQ on one matrix (Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", 2023): columns are rounded one by one, and those still to come make up for the error.

What is minimised is |(W - Q) x|^2 over the calibration tokens, whose second derivative is H = mean x xT.
Axes: N outputs, K inputs in the order in which they are rounded, G groups of inputs.
"""

from __future__ import annotations

from typing import Literal

import torch

from gossamer.checkpoint.codes import Codes
from gossamer.compress.hessian import inverse_cholesky
from gossamer.compress.quantize.rounding import LEVELS, Grid, grid_of, nearest, searched_grid

__all__ = ["ActOrder", "gptq", "output_error"]

ActOrder = Literal["none", "weight", "group"]
_BLOCK = 128  # columns between two updates of all that follow: a multiple of every group


@torch.no_grad()
def gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    format: str,
    group: int,
    *,
    act_order: ActOrder = "weight",
    damping: float = 0.01,
    search: bool = True,
) -> Codes:
    """Weights [N, K] as codes. hessian: mean of x xT [K, K]; damping: of the mean of its diagonal, added to
    it (more where that leaves it without an inverse); search: choose scales of groups by their error.

    act_order "weight" takes the columns of the largest inputs first, on grids chosen beforehand; "group"
    takes whole groups so, and columns within them; "none" the order of the matrix. The latter two choose a
    group's grid from what its weights have become. Inputs that were always zero are rounded to nearest.
    Raises ConfigError where no damping gives the Hessian an inverse.
    """
    n, k = weight.shape
    order = _order(hessian.diagonal(), group, act_order)
    inverse_KK = inverse_cholesky(hessian[order][:, order], damping)
    w_KN = weight.float().T[order].contiguous()
    groups_K = (order // group if group else torch.zeros_like(order)).tolist()
    choose = searched_grid if search else grid_of
    grid = choose(weight.float(), format, group)
    scales_GN = grid.scales.T.contiguous()
    zeros_GN = None if grid.zeros is None else grid.zeros.T.contiguous()
    low, high = LEVELS[format]
    codes_KN = torch.empty_like(w_KN)
    for start in range(0, k, _BLOCK):
        stop = min(start + _BLOCK, k)
        block_KN, root = w_KN[start:stop], inverse_KK[start:stop, start:stop]
        errors_KN = torch.empty_like(block_KN)
        for i in range(stop - start):
            g = groups_K[start + i]
            if group and act_order != "weight" and (start + i == 0 or groups_K[start + i - 1] != g):
                fresh = choose(w_KN[start + i : start + i + group].T, format, group)
                scales_GN[g] = fresh.scales[:, 0]
                if zeros_GN is not None and fresh.zeros is not None:
                    zeros_GN[g] = fresh.zeros[:, 0]
            scale, zero = scales_GN[g], None if zeros_GN is None else zeros_GN[g]
            codes = nearest(block_KN[i], scale, zero, low, high)
            value = (codes if zero is None else codes - zero) * scale
            codes_KN[start + i] = codes
            errors_KN[i] = (block_KN[i] - value) / root[i, i]
            block_KN[i + 1 :].addr_(root[i, i + 1 :], errors_KN[i], alpha=-1)
        w_KN[stop:].addmm_(inverse_KK[start:stop, stop:].T, errors_KN, alpha=-1)
    codes_NK = torch.empty(n, k)
    codes_NK[:, order] = codes_KN.T
    zeros = None if zeros_GN is None else zeros_GN.T.contiguous()
    return Grid(format, group, scales_GN.T.contiguous(), zeros).stored(codes_NK)


def output_error(weight: torch.Tensor, values: torch.Tensor, hessian: torch.Tensor) -> float:
    """The squared error of a layer's outputs as a share of their squares: tr(E H ET) / tr(W H WT)."""
    error = weight - values
    return float(((error @ hessian) * error).sum() / ((weight @ hessian) * weight).sum().clamp(min=1e-30))


def _order(diagonal: torch.Tensor, group: int, act_order: ActOrder) -> torch.Tensor:
    """Columns in the order in which they are rounded."""
    k = len(diagonal)
    if act_order == "none":
        return torch.arange(k)
    largest = torch.argsort(diagonal, descending=True, stable=True)
    if act_order == "weight" or not group:
        return largest
    whole = k // group  # a last group that K does not fill stays last, so that blocks hold whole groups
    sums = diagonal[: whole * group].reshape(whole, group).sum(-1)
    rank = torch.empty(-(-k // group), dtype=torch.long)
    rank[torch.argsort(sums, descending=True, stable=True)] = torch.arange(whole)
    rank[whole:] = whole
    return largest[torch.argsort(rank[largest // group], stable=True)]
