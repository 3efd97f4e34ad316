"""Second moments of what a matrix is multiplied with, and the factor of their inverse that says how the rest
of a row makes up for a weight that changes (Frantar et al., Optimal Brain Compression, 2022, and GPTQ, 2023).

Axes: T tokens, K inputs.
"""

from __future__ import annotations

import torch

from gossamer.compress.blocks import BlockAt, Site
from gossamer.errors import CheckpointError, ConfigError

__all__ = ["Hessian", "collect", "damped", "inverse_cholesky"]

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


def collect(block: BlockAt, value: str | None = None) -> dict[Site, Hessian]:
    """A Hessian for each site of a block; an expert that no token reached has one of 0 tokens.

    value: of the sites of this value alone. Raises CheckpointError for activations that are not finite.
    """
    found: dict[Site, Hessian] = {}
    for site in block.sites():
        if value is not None and site.value != value:
            continue
        found[site] = Hessian(block.matrix(site.matrices[0], site.plane).shape[1])
    block.inputs(lambda site, x: found[site].add(x) if site in found else None)
    for site, hessian in found.items():
        if not torch.isfinite(hessian.mean().diagonal()).all():
            raise CheckpointError(
                f"{site.value}: activations on the calibration text are NaN or infinite; "
                "the checkpoint is damaged, or the steps before broke it"
            )
    return found


def damped(hessian_KK: torch.Tensor, damping: float) -> torch.Tensor:
    """With so much of the mean of its diagonal (where inputs are not always 0) added to the diagonal."""
    alive = hessian_KK.diagonal() > 0
    mean = float(hessian_KK.diagonal()[alive].mean()) if alive.any() else 1.0
    return hessian_KK + damping * mean * torch.eye(len(hessian_KK), dtype=hessian_KK.dtype)


def inverse_cholesky(hessian_KK: torch.Tensor, damping: float) -> torch.Tensor:
    """Upper U [K, K], float32, with U^T U the inverse of the damped Hessian.

    damping: of the mean of the diagonal (where inputs are not always 0), added to it; ten times more where
    that is not positive definite.
    Row j of U beyond its diagonal, over U[j, j], says what an error in column j moves into those behind it.
    A column whose inputs were always 0 has the damping alone: nothing moves into it or out of it.
    Raises ConfigError where no damping helps.
    """
    h = hessian_KK.double()
    for attempt in range(_RETRIES):
        most = damping * 10**attempt
        # H = R R^T with R upper comes of the Cholesky factor of H read backwards; then U is R's inverse.
        lower, failed = torch.linalg.cholesky_ex(damped(h, most).flip(0, 1))
        if not failed:
            inverse = torch.linalg.solve_triangular(lower, torch.eye(len(h), dtype=h.dtype), upper=False)
            upper: torch.Tensor = inverse.flip(0, 1)
            return upper.float()
    raise ConfigError(
        f"the Hessian of {len(h)} inputs is not positive definite with a damping of {most:g}; "
        "calibrate on more text, or raise the recipe's damping"
    )
