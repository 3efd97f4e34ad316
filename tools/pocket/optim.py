"""Optimizers: Muon for the matrices inside the layers, AdamW for the embedding and the norms."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Peak learning rates and weight decay."""

    matrices: float = 3e-3
    others: float = 3e-3
    weight_decay: float = 0.1


def optimizers_for(model: nn.Module, rates: Rates, *, muon: bool) -> list[torch.optim.Optimizer]:
    """The optimizers of a run; norms and the embedding are not decayed.

    With `muon` the updates of the matrices are orthogonalised (Jordan et al. 2024) and scaled to AdamW's
    size, so that one rate suits both.
    """
    parameters = dict(model.named_parameters())
    matrices = [p for name, p in parameters.items() if p.ndim == 2 and name != "embedding"]
    others = [p for name, p in parameters.items() if p.ndim != 2 or name == "embedding"]
    adam = partial(torch.optim.AdamW, betas=(0.9, 0.95), fused=True)
    first: torch.optim.Optimizer
    if muon:
        first = torch.optim.Muon(
            matrices, lr=rates.matrices, weight_decay=rates.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
    else:
        first = adam(matrices, lr=rates.matrices, weight_decay=rates.weight_decay)
    second = adam(others, lr=rates.others, weight_decay=0.0)
    for optimizer in (first, second):
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return [first, second]


def set_factor(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Sets every group to `factor` of its peak rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak_lr"]
