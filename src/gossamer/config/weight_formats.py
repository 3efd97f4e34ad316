"""Spellings of the formats that a weight may be stored in, and the patterns that give them to weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from gossamer.config.mixed_precision import MixedPrecision
from gossamer.config.quantization import Quantization
from gossamer.errors import ConfigError

__all__ = ["FLOATS", "StoredAs", "WeightFormats", "parse_pair", "parse_stored", "weight_formats"]

FLOATS = {
    "float32": None, "fp32": None, "f32": None,
    "bfloat16": "bf16", "bf16": "bf16",
    "float16": "f16", "fp16": "f16", "f16": "f16", "half": "f16",
}  # fmt: skip
"""Spellings of the float formats; None is f32, which no technique need make."""

StoredAs = Quantization | MixedPrecision | None
"""The technique that stores a weight; None leaves it in f32."""

WeightFormats = tuple[tuple[str, str], ...]
"""(pattern over names of weights and nodes, spelling of a format), first match first."""


def parse_stored(text: str) -> StoredAs:
    """From the spelling: f32, bf16, f16 and their long names, or what `Quantization.parse` takes.

    Raises ConfigError for anything else.
    """
    if text in FLOATS:
        half = FLOATS[text]
        return None if half is None else MixedPrecision(dtype=half)  # type: ignore[arg-type]
    try:
        return Quantization.parse(text)
    except ConfigError as error:
        raise ConfigError(f"weight format {text!r} is not f32, bf16 or f16; and {error}") from None


def parse_pair(text: str) -> tuple[str, str]:
    """From the command line's PATTERN=FORMAT. Raises ConfigError where a side is missing or unknown."""
    pattern, equals, stored = text.rpartition("=")
    if not equals or not pattern or not stored:
        raise ConfigError(
            f"weight format {text!r} is not PATTERN=FORMAT; write such as 'layers.*.mlp.down_proj=int8'"
        )
    parse_stored(stored)
    return pattern, stored


def weight_formats(given: Any) -> WeightFormats:
    """Patterns from a mapping or pairs. Raises ConfigError for anything else, for formats that are unknown
    and for a pattern that is given twice."""
    pairs = given.items() if isinstance(given, Mapping) else given
    if isinstance(pairs, str) or not isinstance(pairs, Iterable):
        raise _wrong(given)
    found: list[tuple[str, str]] = []
    for pair in pairs:
        if isinstance(pair, str) or not isinstance(pair, Iterable):
            raise _wrong(given)
        pattern, *rest = pair
        if len(rest) != 1 or not all(isinstance(text, str) and text for text in (pattern, *rest)):
            raise _wrong(given)
        parse_stored(rest[0])
        if pattern in dict(found):
            raise ConfigError(
                f"the weight pattern {pattern!r} has two formats, {dict(found)[pattern]} and {rest[0]}; "
                "give one"
            )
        found.append((pattern, rest[0]))
    return tuple(found)


def _wrong(given: Any) -> ConfigError:
    return ConfigError(
        f"weight_formats is {given!r}; give a mapping from patterns to formats, such as "
        "{'layers.*.mlp.down_proj': 'int8', 'head': 'bf16'}"
    )
