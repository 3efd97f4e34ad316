"""Checks that the configs of several steps share."""

from __future__ import annotations

from collections.abc import Sequence

from gossamer.errors import ConfigError

__all__ = ["check_choice", "check_range"]


def check_choice(what: str, value: object, allowed: Sequence[object]) -> None:
    """Raises ConfigError for a value that is not among those allowed."""
    if value not in allowed:
        raise ConfigError(f"{what} is {value!r}; choose {', '.join(str(a) for a in allowed)}")


def check_range(what: str, value: float, low: float, high: float) -> None:
    """Raises ConfigError for what is no number from low to high."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ConfigError(f"{what} is {value!r}; a number from {low:g} to {high:g} is right")
