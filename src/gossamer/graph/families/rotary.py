"""Rotary frequencies and their scalings, computed from config.json.

Sources: RoPE (Su et al. 2021); linear interpolation (Chen et al. 2023); dynamic NTK (bloc97 2023);
YaRN (Peng et al. 2023); llama3 (Llama 3.1 model card); longrope (Ding et al. 2024). Every step is
rounded to float32 in the order of transformers' modeling_rope_utils: at position 100,000 the last bit
of a frequency turns a key by a hundredth of a radian.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from struct import pack, unpack
from sys import float_info
from typing import Any

from gossamer.errors import UnsupportedModelError

__all__ = ["Rotary", "rotary"]

_KINDS = "linear, dynamic, yarn, llama3, longrope"
_MOST_DIM = 1 << 16  # beyond it a config.json is damaged or hostile, and computing would not end


@dataclass(frozen=True, slots=True)
class Rotary:
    """inv_freq: rotary/2 frequencies, exact in float32; magnitude: factor of cos and sin; reach: the
    longest context that they serve (a scaling stretches it)."""

    inv_freq: tuple[float, ...]
    magnitude: float = 1.0
    reach: int = 0


def rotary(
    *,
    dim: int,
    theta: float,
    scaling: Mapping[str, Any] | None,
    max_positions: int,
    context: int | None = None,
    original: int | None = None,
) -> Rotary:
    """Frequencies of `dim` rotated elements. scaling: config.json's rope_scaling (None: plain).

    context: longest sequence that will run (default max_positions). Dynamic and longrope frequencies
    depend on it; they are fixed at start, so that a token's key does not change with its neighbours.
    original: the length before stretching, where config.json itself states it (longrope).
    Raises UnsupportedModelError for a scaling that is unknown, incomplete or gives no finite numbers.
    """
    if not 2 <= dim <= _MOST_DIM or dim % 2:
        raise UnsupportedModelError(
            f"config.json: head_dim lets {dim} elements rotate; an even number up to {_MOST_DIM} is right"
        )
    read = _Reader(scaling or {"rope_type": "default"})
    context = context or max_positions
    try:
        match read.kind():
            case "default":
                result = Rotary(tuple(_f32(1 / p) for p in _periods(dim, theta)))
            case "linear":
                factor = read.number("factor")
                result = Rotary(tuple(_f32(_f32(1 / p) / factor) for p in _periods(dim, theta)))
            case "dynamic":
                result = _dynamic(read, dim, theta, max_positions, context)
            case "llama3":
                result = _llama3(read, _periods(dim, theta))
            case "yarn":
                result = _yarn(read, dim, theta, max_positions)
            case "longrope" | "su":
                result = _longrope(read, _periods(dim, theta), max_positions, context, original)
            case kind:
                raise UnsupportedModelError(
                    f"config.json: rope scaling {kind!r} is unknown; known are {_KINDS}"
                )
        result = replace(result, reach=_reach(read, max_positions))
    except (OverflowError, ZeroDivisionError, ValueError) as error:
        raise UnsupportedModelError(
            f"config.json: rope_theta {theta} with rope_scaling {dict(scaling or {})} "
            "gives no finite frequencies"
        ) from error
    read.finish()
    return result


def _reach(read: _Reader, max_positions: int) -> int:
    """Positions that a stretch by interpolation covers; the other kinds say so in config.json itself."""
    if read.kind() in ("linear", "dynamic"):
        return int(max_positions * read.number("factor"))
    if read.kind() == "yarn":
        original = read.number("original_max_position_embeddings", max_positions)
        return max(max_positions, int(original * read.number("factor")))
    return max_positions


def _f32(x: float) -> float:
    """x rounded to float32. Raises OverflowError where it is too large."""
    return unpack("<f", pack("<f", x))[0]  # type: ignore[no-any-return]


def _periods(dim: int, theta: float) -> list[float]:
    """theta^(i/dim) for even i."""
    return [_f32(_f32(theta) ** _f32(i / dim)) for i in range(0, dim, 2)]


def _dynamic(read: _Reader, dim: int, theta: float, max_positions: int, context: int) -> Rotary:
    factor = read.number("factor")
    stretch = factor * max(context, max_positions) / max_positions - (factor - 1)
    return Rotary(tuple(_f32(1 / p) for p in _periods(dim, theta * stretch ** (dim / (dim - 2)))))


def _llama3(read: _Reader, periods: list[float]) -> Rotary:
    factor, low, high = (read.number(n) for n in ("factor", "low_freq_factor", "high_freq_factor"))
    original = read.number("original_max_position_embeddings")
    out = []
    for period in periods:
        inv = _f32(1 / period)
        wavelength = _f32(_f32(1 / inv) * _f32(2 * math.pi))
        if wavelength > original / low:
            out.append(_f32(inv / factor))
        elif wavelength < original / high:
            out.append(inv)
        else:
            smooth = _f32(_f32(_f32(_f32(1 / wavelength) * original) - low) / (high - low))
            far = _f32(_f32(_f32(1 - smooth) * inv) / factor)
            out.append(_f32(far + _f32(smooth * inv)))
    return Rotary(tuple(out))


def _yarn(read: _Reader, dim: int, theta: float, max_positions: int) -> Rotary:
    factor = read.number("factor")
    original = read.number("original_max_position_embeddings", max_positions)
    fast, slow = read.number("beta_fast", 32), read.number("beta_slow", 1)
    mscale, mscale_all = read.optional("mscale"), read.optional("mscale_all_dim")

    def gain(weight: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    magnitude = read.optional("attention_factor") or (
        gain(mscale) / gain(mscale_all) if mscale and mscale_all else gain()
    )

    def correction(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    first, last = correction(fast), correction(slow)
    if read.flag("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    if first == last:
        last += 0.001
    out = []
    for i, period in enumerate(_periods(dim, theta)):
        ramp = min(max(_f32(_f32(i - first) / _f32(last - first)), 0.0), 1.0)
        keep = _f32(1 - ramp)
        near, far = _f32(1 / period), _f32(1 / _f32(factor * period))
        out.append(_f32(_f32(far * _f32(1 - keep)) + _f32(near * keep)))
    return Rotary(tuple(out), magnitude)


def _longrope(
    read: _Reader, periods: list[float], max_positions: int, context: int, original: int | None
) -> Rotary:
    short, long = (read.numbers(f"{n}_factor", len(periods)) for n in ("short", "long"))
    factor = read.optional("factor")
    length = read.number("original_max_position_embeddings", max_positions)
    if original is not None:
        length, factor = original, None
    factor = factor or max_positions / length
    magnitude = read.optional("attention_factor") or (
        1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(length))
    )
    chosen = long if context > length else short
    return Rotary(tuple(_f32(1 / _f32(_f32(c) * p)) for c, p in zip(chosen, periods, strict=True)), magnitude)


class _Reader:
    """rope_scaling, with the same strictness as config.json itself."""

    def __init__(self, scaling: Mapping[str, Any]) -> None:
        self.scaling = scaling
        self.read = {"type", "rope_type"}

    def kind(self) -> str:
        kind = self.scaling.get("rope_type", self.scaling.get("type"))
        if not isinstance(kind, str):
            raise UnsupportedModelError(f"config.json: rope_scaling {dict(self.scaling)} has no rope_type")
        return kind

    def number(self, name: str, default: float | None = None) -> float:
        """A number > 0; default None: it is needed."""
        value = self.optional(name)
        if value is None and default is None:
            raise UnsupportedModelError(f"config.json: rope_scaling has no {name}, which its kind needs")
        return value if value is not None else float(default or 0)

    def optional(self, name: str) -> float | None:
        """A number > 0, or None where absent."""
        self.read.add(name)
        value = self.scaling.get(name)
        if value is None:
            return None
        if not _positive(value):
            raise UnsupportedModelError(
                f"config.json: rope_scaling's {name} is {value!r}; a number above 0 is right"
            )
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        self.read.add(name)
        return bool(self.scaling.get(name, default))

    def numbers(self, name: str, count: int) -> list[float]:
        self.read.add(name)
        value = self.scaling.get(name)
        if not isinstance(value, list) or len(value) != count or not all(_positive(v) for v in value):
            raise UnsupportedModelError(f"config.json: rope_scaling's {name} must be {count} numbers above 0")
        return [float(v) for v in value]

    def finish(self) -> None:
        if unknown := [k for k, v in self.scaling.items() if k not in self.read and v is not None]:
            raise UnsupportedModelError(
                f"config.json: rope_scaling's {', '.join(unknown)} is not understood "
                "(--ignore-config-field rope_scaling goes on without any scaling)"
            )


def _positive(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and 0 < value <= float_info.max
