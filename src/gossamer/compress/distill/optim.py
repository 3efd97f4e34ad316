"""What training takes steps with: optimizers, the learning rate's course, and zeros that stay zero."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from gossamer.backends.reference import ReferenceModel
from gossamer.config.compression.train import Training

__all__ = ["Zeros", "optimizers", "rate"]


def rate(config: Training, step: int) -> float:
    """Learning rate of a step: a linear warm-up, then a cosine down to `final` of the peak in the last one
    (Loshchilov and Hutter 2017)."""
    warm = round(config.steps * config.warmup)
    if step < warm:
        return config.lr * (step + 1) / warm
    way = (step - warm) / max(1, config.steps - 1 - warm)
    return config.lr * (config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * way)))


def optimizers(model: ReferenceModel, beside: nn.Module, config: Training) -> list[torch.optim.Optimizer]:
    """AdamW (Loshchilov and Hutter 2019), which decays matrices and leaves vectors; with config.optimizer
    "muon" the matrices of the layers get orthogonalised updates of AdamW's size instead (Jordan et al. 2024),
    so that one learning rate suits both. beside: what is trained along."""
    inside = {w for node in model.graph.nodes if node.scope for w in node.weights}
    muon: list[Tensor] = []
    matrices: list[Tensor] = list(beside.parameters())
    vectors: list[Tensor] = []
    for name, p in model.named_parameters():
        if p.ndim == 2 and name in inside and config.optimizer == "muon":
            muon.append(p)
        else:
            (matrices if p.ndim > 1 else vectors).append(p)
    adam = partial(torch.optim.AdamW, lr=config.lr, betas=(0.9, 0.95), fused=True)
    groups = [(matrices, config.weight_decay), (vectors, 0.0)]
    found: list[torch.optim.Optimizer] = [
        adam([{"params": some, "weight_decay": decay} for some, decay in groups if some])
    ]
    if muon:
        found.append(
            torch.optim.Muon(
                muon, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
            )
        )
    return found


class Zeros:
    """Matrices' weights that are zero now, and shall be again after every step of an optimizer."""

    def __init__(self, model: nn.Module) -> None:
        self._kept: list[tuple[nn.Parameter, Tensor]] = []
        self.count = 0
        for p in model.parameters():
            kept = p.detach() != 0
            if p.ndim > 1 and not bool(kept.all()):
                self._kept.append((p, kept))
                self.count += int(kept.numel() - kept.sum())

    @torch.no_grad()
    def gradients(self) -> None:
        """Their gradients: they count for no norm and no moment."""
        for p, kept in self._kept:
            if p.grad is not None:
                p.grad.mul_(kept)

    @torch.no_grad()
    def weights(self) -> None:
        """The weights themselves."""
        for p, kept in self._kept:
            p.mul_(kept)
