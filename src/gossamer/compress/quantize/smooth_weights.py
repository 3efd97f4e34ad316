"""SmoothQuant on the matrices that read one value (Xiao et al., "SmoothQuant: Accurate and Efficient
Post-Training Quantization for Large Language Models", 2023), and the scale of activations that have just one.

Axes: T tokens of a sample, N outputs, K inputs, F factors of a scaling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gossamer.compress.quantize.awq_weights import spread
from gossamer.graph.ops.formats import round_activations, round_weight

__all__ = ["Sample", "Smoothed", "best_share", "clipping_losses", "smoothed"]

_ALPHAS = [i / 20 for i in range(21)]
SHARES = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]
"""Of the largest activation: what one scale for all tokens is tried to span."""


class Sample:
    """What reaches a site: some of its tokens [T, K], and the largest of all in each channel."""

    def __init__(self, width: int, every: int) -> None:
        """every: of so many tokens one is kept."""
        self.largest_K = torch.zeros(width)
        self._every, self._parts = every, [torch.empty(0, width)]

    def add(self, x_TK: torch.Tensor) -> None:
        """Some more of them."""
        if len(x_TK):
            self.largest_K = torch.maximum(self.largest_K, x_TK.abs().amax(0))
            self._parts.append(x_TK[:: self._every].clone())

    def tokens(self) -> torch.Tensor:
        """[T, K]."""
        self._parts = [torch.cat(self._parts)]
        return self._parts[0]

    def divide(self, factors_K: torch.Tensor) -> None:
        """What reaches the site once factors have moved."""
        self._parts = [self.tokens() / factors_K]
        self.largest_K = self.largest_K / factors_K


@dataclass(frozen=True, slots=True)
class Smoothed:
    """A matrix [N, K] whose inputs are a sample's. format: what it becomes ("f32" is not rounded); static:
    whether its activations have one scale."""

    weight: torch.Tensor
    sample: Sample
    format: str
    group: int
    static: bool


def smoothed(
    readers: Sequence[Smoothed], factor: Sequence[int] | None, size: int, alpha: float | None
) -> tuple[torch.Tensor, float | None]:
    """(factors [F] for the columns of all readers, the alpha that gave them).

    max|x|^alpha / max|w|^(1 - alpha), of channels whose activations are 0 throughout 1. alpha None: of 0,
    0.05 ... 1 that which gives the least error of the outputs, or no factors (alpha None) where none helps.
    """
    index = torch.arange(size) if factor is None else torch.tensor(factor)
    x_F, w_F = torch.zeros(size), torch.zeros(size)
    for reader in readers:
        x_F.scatter_reduce_(0, index, reader.sample.largest_K, "amax")
        w_F.scatter_reduce_(0, index, reader.weight.abs().amax(0), "amax")
    best: tuple[float, torch.Tensor, float | None] = (float("inf"), torch.ones(size), None)
    if alpha is None:
        best = (_error(readers, torch.ones(size), factor), torch.ones(size), None)
    for each in _ALPHAS if alpha is None else [alpha]:
        factors_F = torch.where((x_F > 0) & (w_F > 0), x_F**each / w_F ** (1 - each), 1.0)
        middle = (factors_F.max() * factors_F.min()).sqrt()
        factors_F = (factors_F / middle).clamp(1e-4, 1e4)
        loss = _error(readers, factors_F, factor) if alpha is None else 0.0
        if loss < best[0]:
            best = (loss, factors_F, each)
    return best[1], best[2]


def clipping_losses(x_TK: torch.Tensor, importance_K: torch.Tensor, largest: float) -> torch.Tensor:
    """For each of SHARES the squared error of activations whose one scale spans that share of the largest,
    weighted by what each channel's error costs (the squares of its column of weights). Those of parts of the
    tokens add up."""
    losses = []
    for share in SHARES:
        error = round_static(x_TK, share * largest / 127) - x_TK
        losses.append((error.square() @ importance_K).sum())
    return torch.stack(losses)


def best_share(losses: torch.Tensor) -> float:
    """The share that costs least, the larger of equals."""
    return SHARES[int(losses.argmin())]


def round_static(x: torch.Tensor, scale: float) -> torch.Tensor:
    """int8 activations of one scale, as kernels make them; a scale of 0 stands for zeros."""
    return (x / scale).round().clamp(-127, 127) * scale if scale else torch.zeros_like(x)


def _error(readers: Sequence[Smoothed], factors_F: torch.Tensor, factor: Sequence[int] | None) -> float:
    """The squared error of all outputs over the samples."""
    factors_K = spread(factors_F, factor)
    total = 0.0
    for reader in readers:
        if reader.format == "f32":
            continue
        x, weight = reader.sample.tokens(), reader.weight
        rounded = round_weight(weight * factors_K, reader.format, reader.group)
        if reader.static:
            largest = float((reader.sample.largest_K / factors_K).max())
            losses = clipping_losses(x / factors_K, (weight * factors_K).square().sum(0), largest)
            seen = round_static(x / factors_K, best_share(losses) * largest / 127)
        else:
            seen = round_activations(x / factors_K, reader.format, reader.group)
        total += float((seen @ rounded.T - x @ weight.T).square().sum())
    return total
