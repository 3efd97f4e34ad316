"""A ledger as JSON and back: what `gossamer ablate --json` prints, and what a report is made of again."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from gossamer.bench.ledger import METRICS, Ledger
from gossamer.errors import ConfigError

__all__ = ["VERSION", "ledger_from_json", "ledger_to_json"]

VERSION = 1
_NEXT = "make one with: gossamer ablate MODEL --json"
_UNBOUNDED = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def ledger_to_json(ledger: Ledger) -> str:
    """One JSON object, indented. JSON has no numbers that are not finite: those are the strings "inf", "-inf"
    and "nan", so that a model which overflows loses nobody's measurements."""
    plain = {"gossamer_ledger": VERSION} | _plain(ledger)
    return json.dumps(plain, ensure_ascii=False, indent=1, allow_nan=False)


def ledger_from_json(text: str) -> Ledger:
    """The ledger that `ledger_to_json` wrote; what its free-form dictionaries held as tuples are lists now.
    Raises ConfigError, naming the place, for what is no JSON, another version, and keys or values that a
    ledger does not have."""
    try:
        plain = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"this is no ledger, because it is no JSON ({error}); {_NEXT}") from error
    version = plain.pop("gossamer_ledger", None) if isinstance(plain, dict) else None
    if version != VERSION or isinstance(version, bool):
        raise ConfigError(f'"gossamer_ledger" is {version!r}, and {VERSION} is what is read here; {_NEXT}')
    ledger: Ledger = _read(plain, Ledger, "ledger")
    for i, row in enumerate(ledger.rows):
        sides = [metric for side in (row.off, row.on) if side for metric in side.figures]
        for metric in sides + [effect.metric for effect in row.effects]:
            if metric not in METRICS:
                raise _refusal(f"a metric of ledger.rows[{i}]", metric, "one of " + ", ".join(METRICS))
    return ledger


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _read(value: Any, kind: Any, at: str) -> Any:
    """`value` as a `kind`, which is any annotation that a ledger's fields have; `at` is its place."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, UnionType):
        if value is None and NoneType in inner:
            return None
        return _read(value, next(k for k in inner if k is not NoneType), at)
    if origin is Literal:
        if not isinstance(value, str) or value not in inner:
            raise _refusal(at, value, "one of " + ", ".join(map(str, inner)))
        return value
    if origin is tuple:
        return _read_tuple(value, inner, at)
    if origin is dict:
        found = _checked(value, at, "an object", lambda v: isinstance(v, dict))
        return {key: _read(v, inner[1], f"{at}.{key}") for key, v in found.items()}
    if is_dataclass(kind):
        return _read_fields(value, kind, at)
    return _read_scalar(value, kind, at)


def _read_scalar(value: Any, kind: Any, at: str) -> Any:
    if kind is float:
        if isinstance(value, str) and value in _UNBOUNDED:
            return _UNBOUNDED[value]
        finite = sys.float_info.max
        return float(_checked(value, at, "a number", lambda v: type(v) in (int, float) and abs(v) <= finite))
    if kind is int:
        return _checked(value, at, "a whole number", lambda v: type(v) is int)
    return _checked(value, at, "text", lambda v: isinstance(v, str))


def _read_tuple(value: Any, inner: tuple[Any, ...], at: str) -> tuple[Any, ...]:
    found = _checked(value, at, "a list", lambda v: isinstance(v, list))
    kinds = (inner[0],) * len(found) if inner[-1] is Ellipsis else inner
    if len(kinds) != len(found):
        raise _refusal(at, value, f"a list of {len(kinds)}")
    return tuple(_read(v, k, f"{at}[{i}]") for i, (v, k) in enumerate(zip(found, kinds)))


def _read_fields(value: Any, kind: Any, at: str) -> Any:
    found = _checked(value, at, "an object", lambda v: isinstance(v, dict))
    hints = _hints(kind)
    if unknown := sorted(found.keys() - hints.keys()):
        raise ConfigError(f"{at} has no {unknown[0]!r}; it has {', '.join(hints)}; {_NEXT}")
    if missing := [name for name in hints if name not in found]:
        raise ConfigError(f"{at}.{missing[0]} is missing; {_NEXT}")
    return kind(**{name: _read(found[name], hint, f"{at}.{name}") for name, hint in hints.items()})


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _checked(value: Any, at: str, allowed: str, holds: Callable[[Any], bool]) -> Any:
    if not holds(value):
        raise _refusal(at, value, allowed)
    return value


def _refusal(at: str, value: Any, allowed: str) -> ConfigError:
    shown = repr(value)
    return ConfigError(
        f"{at} is {shown[:60]}{'...' if len(shown) > 60 else ''}, and must be {allowed}; {_NEXT}"
    )
