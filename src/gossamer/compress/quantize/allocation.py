"""Which format every matrix gets: a linear program in whole numbers, solved by HiGHS (Huangfu and Hall, 2018)
through scipy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from gossamer.errors import ConfigError

__all__ = ["Offer", "least_bytes", "least_loss"]

_OPTIONS = {"mip_rel_gap": 1e-5, "time_limit": 60.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What one choice would take, and what it would cost. bytes: stored; loss: in nats per token."""

    bytes: int
    loss: float


def least_loss(offers: Sequence[Sequence[Offer]], budget: int) -> list[int]:
    """Of each sequence the index of one offer, so that the sum of losses is least and bytes stay within the
    budget. Raises ConfigError for a budget below the least."""
    least = sum(min(o.bytes for o in choice) for choice in offers)
    if budget < least:
        raise ConfigError(
            f"a budget of {budget} bytes is below the {least} that the smallest of all candidates take; "
            "raise it, or offer smaller candidates"
        )
    return _solve(offers, minimise="loss", limit=budget)


def least_bytes(offers: Sequence[Sequence[Offer]], most: float) -> list[int]:
    """The same so that bytes are least and the sum of losses stays within `most`. Raises ConfigError where
    even the best of all candidates lose more."""
    least = sum(min(o.loss for o in choice) for choice in offers)
    if most < least:
        raise ConfigError(
            f"a KL divergence of {most:g} is below the {least:.3g} that the best of all candidates lose; "
            "raise it, or offer finer candidates"
        )
    return _solve(offers, minimise="bytes", limit=most)


def _solve(offers: Sequence[Sequence[Offer]], *, minimise: str, limit: float) -> list[int]:
    flat = [offer for choice in offers for offer in choice]
    losses = _scaled([max(o.loss, 0.0) for o in flat])
    bytes_ = _scaled([o.bytes for o in flat])
    # Scaled alike, so that the solver's tolerances are small beside every limit.
    if minimise == "loss":
        goal, bound, most = losses, bytes_, limit * _factor([o.bytes for o in flat])
    else:
        goal, bound, most = bytes_, losses, limit * _factor([max(o.loss, 0.0) for o in flat])
    owner = np.repeat(np.arange(len(offers)), [len(choice) for choice in offers])
    one = csr_matrix((np.ones(len(flat)), (owner, np.arange(len(flat)))))
    result = milp(
        goal,
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one, 1, 1), LinearConstraint(bound[None], -np.inf, most)],
        options=_OPTIONS,
    )
    if result.x is None:
        raise ConfigError(f"no choice of formats was found ({result.message}); loosen the budget")
    chosen = result.x > 0.5
    return [int(np.flatnonzero(chosen[owner == i])[0]) for i in range(len(offers))]


def _factor(values: Sequence[float]) -> float:
    most = max(values)
    return 1000.0 / most if most > 0 else 1.0


def _scaled(values: Sequence[float]) -> npt.NDArray[np.float64]:
    return np.asarray(values, np.float64) * _factor(values)
