"""Combinations that cannot be are refused, with every reason and the nearest ones that can.

All combinations of the changes that the broken rules offer are tried, fewest changes first, so none with
fewer would do; among as few, those come first that keep more of what the user set.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, fields, replace
from itertools import combinations, product
from typing import TYPE_CHECKING, Any

from gossamer.config.rules import BATCHING, RULES, Choices, Rule
from gossamer.config.static_batching import StaticBatching
from gossamer.config.typed import typed
from gossamer.errors import ConflictError

if TYPE_CHECKING:
    from gossamer.config.engine import EngineConfig

__all__ = ["adapt", "belong", "broken", "check"]

_SHOWN, _SHORT = 3, 2  # ways that are shown, where the nearest has so many changes at most; else it alone


def broken(choices: Choices) -> list[Rule]:
    """The rules that do not hold."""
    return [rule for rule in RULES if not rule.holds(choices)]


def check(config: EngineConfig) -> None:
    """Raises ConflictError for choices that break a rule."""
    choices = Choices(config, {})
    if rules := broken(choices):
        _refuse(choices, rules, _nearest(config, choices))


def adapt(config: EngineConfig, **changes: Any) -> EngineConfig:
    """The configuration with these changes, and the fewest others that they bring along: without pages there
    is no prefix cache, and one batching takes the other's place. Raises ConflictError where none would do."""
    if len(given := [name for name in BATCHING if name in changes]) == 1:
        [other] = {*BATCHING} - {*given}
        runs = getattr(config, other) or _default(config, other) or StaticBatching()
        changes[other] = runs if changes[given[0]] is None else None
    choices = Choices(config, changes)
    rules = broken(choices)
    if not rules:
        return replace(config, **changes)
    keep = {"batching" if name in BATCHING else name for name in changes}
    found = _nearest(config, choices, keep)
    if not found:
        _refuse(choices, rules, ())
    return replace(config, **changes | _as_fields(found[0]))


def belong(parts: Mapping[str, Any], technique: str, off: str) -> None:
    """Raises ConflictError where a part of a technique was given (is not None) that a flag turns off."""
    given = [flag for flag, value in parts.items() if value is not None]
    if given:
        raise ConflictError(
            [f"{' and '.join(given)} belong{'s' * (len(given) == 1)} to {technique}, which {off} turns off"],
            [[f"without {flag}" for flag in given], [f"without {off}"]],
        )


def _refuse(choices: Choices, rules: Iterable[Rule], found: Iterable[Mapping[str, Any]]) -> None:
    found = list(found)
    ways = [[word for name, value in way.items() for word in typed(name, getattr(choices, name), value)]
            for way in found]  # fmt: skip
    shown = _SHOWN if found and len(found[0]) <= _SHORT else 1
    raise ConflictError(
        [rule.reason(choices) for rule in rules], ways[:shown], _as_fields(found[0]) if found else {}
    )


def _nearest(config: EngineConfig, choices: Choices, keep: Collection[str] = ()) -> list[dict[str, Any]]:
    """The smallest sets of changes after which every rule holds, those that change least of what differs from
    the defaults; keep: choices that stay."""
    offers = _offers(choices, keep)
    given = {name for name in offers if getattr(choices, name) != _default(config, name)}
    for size in range(1, len(offers) + 1):
        ways = [
            dict(zip(names, values))
            for names in combinations(offers, size)
            for values in product(*(offers[name] for name in names))
        ]
        if found := [way for way in ways if not broken(choices.but(way))]:
            least = min(len(given & way.keys()) for way in found)
            return [way for way in found if len(given & way.keys()) == least]
    return []


def _offers(choices: Choices, keep: Collection[str]) -> dict[str, list[Any]]:
    """Choice -> values that some rule offers: for these choices, or for them after one such change."""
    offers: dict[str, list[Any]] = {}
    todo: list[dict[str, Any]] = [{}]
    for changes in todo:
        changed = choices.but(changes)
        for rule in broken(changed):
            for name, value in rule.repairs(changed):
                known = offers.get(name, [])
                if name not in keep and value != getattr(choices, name) and value not in known:
                    offers[name] = [*known, value]
                    todo.append({name: value})
    return offers


def _default(config: EngineConfig, name: str) -> Any:
    if name == "batching":
        return tuple(_default(config, own) for own in BATCHING)
    own = next(own for own in fields(config) if own.name == name)
    return own.default if own.default_factory is MISSING else own.default_factory()


def _as_fields(changes: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(changes)
    if "batching" in out:
        out |= dict(zip(BATCHING, out.pop("batching")))
    return out
