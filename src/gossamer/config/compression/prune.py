"""Pruning: what each algorithm takes."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from gossamer.config.compression.checks import check_choice, check_range
from gossamer.errors import ConfigError

__all__ = ["Magnitude", "SparseGPT", "Structured", "Wanda", "parse_pattern"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unstructured:
    """What algorithms that zero single weights share."""

    sparsity: float = 0.5
    """Share of zeros in every matrix of the blocks; embedding and head stay whole."""
    pattern: str | None = None
    """"2:4" keeps at most two of every four neighbouring inputs (any n:m up to 32); sparsity must agree."""
    skip: tuple[str, ...] = ()
    """Patterns over names of weights and nodes that stay whole."""

    def __post_init__(self) -> None:
        check_range("prune.sparsity", self.sparsity, 0.0, 0.99)
        for pattern in self.skip:
            if not isinstance(pattern, str) or not pattern:
                raise ConfigError(f"prune.skip has {pattern!r}; patterns in quotes are right")
        if self.pattern is not None:
            kept, of = parse_pattern(self.pattern)
            if abs(1 - kept / of - self.sparsity) > 1e-9:
                raise ConfigError(
                    f"prune.pattern {self.pattern} makes {float(1 - Fraction(kept, of)):.4g} of the weights "
                    f"zero, and prune.sparsity says {self.sparsity:g}; make them agree"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Magnitude(Unstructured):
    """The smallest weights of each matrix go; no calibration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanda(Unstructured):
    """The smallest |weight| times norm of its input go, output by output (Sun et al., Wanda, 2024)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseGPT(Unstructured):
    """What costs the layer's output least goes, and the weights that stay make up for it (Frantar and
    Alistarh, SparseGPT, 2023)."""

    damping: float = 0.01
    block: int = 32
    """Columns whose mask is chosen together."""
    refine: int = 20
    """Steps of conjugate gradients for the weights that stay, once all columns are settled (0: none)."""

    def __post_init__(self) -> None:
        Unstructured.__post_init__(self)
        check_range("prune.damping", self.damping, 1e-6, 1.0)
        check_range("prune.block", self.block, 1, 4096)
        check_range("prune.refine", self.refine, 0, 1000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Structured:
    """Whole parts go, alike in every layer: a smaller model of the same architecture. Shares are of what
    there is, 0 leaves it; what is left is rounded to what kernels like."""

    heads: float = 0.0
    """Of key-value heads, with the query heads that read them."""
    ffn: float = 0.0
    """Of the channels of every MLP."""
    hidden: float = 0.0
    """Of the hidden width."""
    layers: float = 0.0
    """Of whole layers."""
    importance: Literal["activation", "taylor"] = "activation"
    """What is least important: by the size of activations (Muralidharan et al., Minitron, 2024), or by the
    first order of the loss (Molchanov et al., 2019)."""
    ffn_multiple: int = 32
    hidden_multiple: int = 32
    """What is left is a multiple of these."""

    def __post_init__(self) -> None:
        for name in ("heads", "ffn", "hidden", "layers"):
            check_range(f"prune.{name}", getattr(self, name), 0.0, 0.95)
        if not (self.heads or self.ffn or self.hidden or self.layers):
            raise ConfigError("structured pruning needs a share of heads, ffn, hidden or layers above 0")
        check_choice("prune.importance", self.importance, ("activation", "taylor"))
        for name in ("ffn_multiple", "hidden_multiple"):
            check_range(f"prune.{name}", getattr(self, name), 1, 4096)


def parse_pattern(text: str) -> tuple[int, int]:
    """(kept, of) from n:m. Raises ConfigError."""
    n, _, m = str(text).partition(":")
    if not (n.isdecimal() and m.isdecimal() and 0 < int(n) < int(m) <= 32):
        raise ConfigError(f"prune.pattern is {text!r}; n:m with 0 < n < m <= 32 is right, such as 2:4")
    return int(n), int(m)
