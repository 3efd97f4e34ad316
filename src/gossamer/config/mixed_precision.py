"""Mixed precision: half-width weights and matmuls; norms, softmax, residual and logits in fp32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from gossamer.errors import ConfigError

HalfType = Literal["bf16", "f16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedPrecision:
    """dtype: what weights of linear layers and embeddings are stored in."""

    dtype: HalfType = "bf16"

    def __post_init__(self) -> None:
        if self.dtype not in get_args(HalfType):
            raise ConfigError(f"mixed precision dtype {self.dtype!r} is unknown; choose bf16 or f16")
