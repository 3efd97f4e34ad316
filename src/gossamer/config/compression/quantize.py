"""Quantization ahead of serving: what each algorithm takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gossamer.config.compression.checks import check_choice, check_range
from gossamer.config.quantization import Quantization
from gossamer.config.weight_formats import WeightFormats, parse_stored, weight_formats
from gossamer.errors import ConfigError

__all__ = ["AWQ", "GPTQ", "RTN", "KVCalibration", "MixedBits", "SmoothQuant"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RTN:
    """Round-to-nearest, no calibration."""

    format: str = "int4-g128"
    """As --quantization spells it; nf4 is made at load alone."""
    overrides: WeightFormats = ()
    """(pattern over names of weights and nodes, format) pairs that win over `format`, first match first; a
    float format leaves the matrix as it is."""

    def __post_init__(self) -> None:
        check_written("quantize.format", self.format)
        weight_formats(self.overrides)


@dataclass(frozen=True, slots=True, kw_only=True)
class GPTQ:
    """Column by column, each one's rounding error made up for by the columns that follow (Frantar et al.,
    GPTQ, 2023)."""

    format: str = "int4-g128"
    overrides: WeightFormats = ()
    act_order: Literal["none", "weight", "group"] = "weight"
    """Columns of the largest inputs first. "weight": any column, groups keep their neighbours and their
    scales are chosen beforehand; "group": whole groups in the order of their inputs, columns by theirs within
    one."""
    damping: float = 0.01
    """Of the mean of the Hessian's diagonal, added to it."""
    search: bool = True
    """Whether a group's scale is the one that loses least, rather than what its largest weight asks for."""

    def __post_init__(self) -> None:
        check_written("quantize.format", self.format)
        weight_formats(self.overrides)
        check_choice("quantize.act_order", self.act_order, ("none", "weight", "group"))
        check_range("quantize.damping", self.damping, 1e-6, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class AWQ:
    """Input channels that matter are scaled up before rounding, and the layer before scaled down
    (Lin et al., AWQ, 2024)."""

    format: str = "int4-g128"
    """As --quantization spells it. uint4 loses a little less; transformers cannot load it."""
    overrides: WeightFormats = ()
    grid: int = 20
    """How many exponents of the scales are tried for each layer."""
    clip: bool = True
    """Whether to search for the range of each group, too."""

    def __post_init__(self) -> None:
        check_written("quantize.format", self.format)
        weight_formats(self.overrides)
        check_range("quantize.grid", self.grid, 1, 200)


@dataclass(frozen=True, slots=True, kw_only=True)
class SmoothQuant:
    """int8 weights and int8 activations: outliers move from activations into weights (Xiao et al.,
    SmoothQuant, 2023)."""

    alpha: float | None = None
    """How much moves, 0 to 1; None searches for each layer."""
    activations: Literal["dynamic", "static"] = "dynamic"
    """"dynamic": a scale for each token as it comes; "static": one for each layer, from calibration."""
    overrides: WeightFormats = ()

    def __post_init__(self) -> None:
        if self.alpha is not None:
            check_range("quantize.alpha", self.alpha, 0.0, 1.0)
        check_choice("quantize.activations", self.activations, ("dynamic", "static"))
        weight_formats(self.overrides)


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedBits:
    """A format for each matrix, by measured sensitivity, within a budget or a quality limit."""

    candidates: tuple[str, ...] = ("int4-g128", "int4-g32", "int8")
    average_bits: float | None = None
    """Of a weight, scales included, over all matrices that are quantized."""
    max_bytes: int | None = None
    """Of all matrices."""
    max_kl: float | None = None
    """Mean KL divergence to the model before, in nats per token, on the calibration text: the smallest model
    within it. Exactly one of the three is given."""
    method: Literal["rtn", "gptq"] = "gptq"
    """How the chosen formats are made."""
    overrides: WeightFormats = ()
    """Matrices whose format is given, as of `RTN`; the others have what these leave of the budget."""
    windows: int = 8
    """Of the calibration text, on which the divergence of every matrix in every candidate is measured."""

    def __post_init__(self) -> None:
        for candidate in self.candidates:
            check_written("quantize.candidates", candidate)
        if len(set(self.candidates)) < 2:
            raise ConfigError(f"quantize.candidates is {self.candidates}; two formats at least are a choice")
        given = [n for n in ("average_bits", "max_bytes", "max_kl") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ConfigError(
                "mixed bits need exactly one of average_bits, max_bytes and max_kl; given: "
                + (" and ".join(given) or "none")
            )
        if self.average_bits is not None:
            check_range("quantize.average_bits", self.average_bits, 1.0, 32.0)
        if self.max_bytes is not None:
            check_range("quantize.max_bytes", self.max_bytes, 1, 2**50)
        if self.max_kl is not None:
            check_range("quantize.max_kl", self.max_kl, 1e-9, 100.0)
        check_choice("quantize.method", self.method, ("rtn", "gptq"))
        weight_formats(self.overrides)
        check_range("quantize.windows", self.windows, 1, 2**20)


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCalibration:
    """Channels of keys and values are balanced, at no cost at run time, so that a KV cache in few bits loses
    less; the certificate says what remains."""

    format: Literal["int8", "int4"] = "int4"

    def __post_init__(self) -> None:
        check_choice("quantize.format", self.format, ("int8", "int4"))


def check_written(what: str, format: str) -> None:
    """Raises ConfigError for a format that cannot be written: a float, an unknown one, nf4 or fp8."""
    if not isinstance(format, str):
        raise ConfigError(f'{what} is {format!r}; a format in quotes is right, such as "int8"')
    parsed = parse_stored(format)
    if not isinstance(parsed, Quantization) or parsed.format in ("nf4", "fp8"):
        raise ConfigError(
            f"{what} is {format!r}; choose int8, int4 or uint4 (and -g with a group); nf4 and fp8 are made "
            "at load: --quantization nf4"
        )
