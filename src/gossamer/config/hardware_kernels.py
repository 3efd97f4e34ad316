"""Hardware-specific kernels: which instruction set's kernels run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from gossamer.errors import ConfigError

Isa = Literal["scalar", "avx2", "avx512"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareKernels:
    """isa: force one instruction set (an error where the machine lacks it); None: the best there is.
    autotune: measure how to cut each layer into tiles at the first start, and remember it. The technique
    off (None in EngineConfig) runs the scalar kernels, cut by default."""

    isa: Isa | None = None
    autotune: bool = True

    def __post_init__(self) -> None:
        if self.isa is not None and self.isa not in get_args(Isa):
            raise ConfigError(f"instruction set {self.isa!r} is unknown; choose {', '.join(get_args(Isa))}")
