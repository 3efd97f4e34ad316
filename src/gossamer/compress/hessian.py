"""Second moments of what a matrix is multiplied with, and the factor of their inverse that says how the rest
of a row makes up for a weight that changes (Frantar et al., Optimal Brain Compression, 2022, and GPTQ, 2023).

Axes: T tokens, K inputs.
"""

from __future__ import annotations

import torch

from gossamer.compress.blocks import BlockAt, Site
from gossamer.errors import CheckpointError, ConfigError

__all__ = ["Hessian", "collect", "inverse_cholesky"]

_RETRIES = 6  # each with ten times the damping


class Hessian:
    """The mean of x x^T over tokens, summed in float32. (The Hessian of a row's squared error is twice that;
    nothing here depends on its scale.)"""

    def __init__(self, width: int) -> None:
        self.tokens = 0
        self._sum_KK = torch.zeros(width, width)

    def add(self, x_TK: torch.Tensor) -> None:
        """Some more inputs."""
        x = x_TK.float()
        self.tokens += x.shape[0]
        self._sum_KK.addmm_(x.T, x)

    def mean(self) -> torch.Tensor:
        """[K, K], float32; zeros before the first token."""
        return self._sum_KK / max(1, self.tokens)


def collect(block: BlockAt) -> dict[Site, Hessian]:
    """A Hessian for each site of a block; an expert that no token reached has one of 0 tokens.

    Raises CheckpointError for activations that are not finite.
    """
    found: dict[Site, Hessian] = {}
    for site in block.sites():
        found[site] = Hessian(block.matrix(site.matrices[0], site.plane).shape[1])
    block.inputs(lambda site, x: found[site].add(x))
    for site, hessian in found.items():
        if not torch.isfinite(hessian.mean().diagonal()).all():
            raise CheckpointError(
                f"{site.value}: activations on the calibration text are NaN or infinite; "
                "the checkpoint is damaged, or the steps before broke it"
            )
    return found


def inverse_cholesky(hessian_KK: torch.Tensor, damping: float) -> torch.Tensor:
    """Upper U [K, K], float32, with U^T U the inverse of the damped Hessian.

    damping: of the mean of the diagonal (where inputs are not always 0), added to it; ten times more where
    that is not positive definite.
    Row j of U beyond its diagonal, over U[j, j], says what an error in column j moves into those behind it.
    A column whose inputs were always 0 has the damping alone: nothing moves into it or out of it.
    Raises ConfigError where no damping helps.
    """
    h = hessian_KK.double()
    alive = h.diagonal() > 0
    mean = float(h.diagonal()[alive].mean()) if alive.any() else 1.0
    for attempt in range(_RETRIES):
        extra = damping * 10**attempt * mean
        # H = R R^T with R upper comes of the Cholesky factor of H read backwards; then U is R's inverse.
        damped = (h + extra * torch.eye(len(h), dtype=h.dtype)).flip(0, 1)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.linalg.solve_triangular(lower, torch.eye(len(h), dtype=h.dtype), upper=False)
            upper: torch.Tensor = inverse.flip(0, 1)
            return upper.float()
    raise ConfigError(
        f"the Hessian of {len(h)} inputs is not positive definite with a damping of {extra / mean:g}; "
        "calibrate on more text, or raise the recipe's damping"
    )
