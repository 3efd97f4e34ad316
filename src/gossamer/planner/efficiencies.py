"""Which part of the machine's limits kernels reach: measured here, or as shipped."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SHIPPED", "Efficiencies"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiencies:
    """bandwidth: of the probed read rate, where a step reads its weights; compute: of the probed peak of the
    type a format multiplies in. overhead_us: of a step outside of the program. origin: whence they are."""

    bandwidth: float = 0.8
    compute: float = 0.6
    overhead_us: float = 100.0
    origin: str = "shipped"


SHIPPED = Efficiencies()
