"""A TOML file in place of flags. Keys are the names of the long flags without the dashes. What stands at the
top is for every verb that has such a flag; a table named after a verb (`[serve]`, `[bench.latency]`) is for
that verb alone, and wins over the top:

    model = "Qwen/Qwen3-0.6B"
    max-model-len = 4096

    [serve]
    port = 8080
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import typer

from gossamer.errors import ConfigError

__all__ = ["apply_config_file"]

_NO_KEYS = {"config", "help"}


def apply_config_file(ctx: typer.Context, path: Path) -> None:
    """Makes the file's values the verb's defaults.

    Raises ConfigError for a file that cannot be read, a key that no flag has, and a value of the wrong kind.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None
    except ValueError as error:  # also of numbers with too many digits
        raise ConfigError(f"{path} is not TOML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path} is not TOML that can be read: its values are nested too deep") from None
    root: Any = ctx.find_root().command
    own = _keys(ctx.command)
    every = {key for command in _leaves(root) for key in _keys(command)}
    values = {}
    for key, value in content.items():
        if key in root.commands:
            _check_table(path, root.commands[key], key, value)
        elif isinstance(value, dict):
            raise _unknown(path, "table", key, root.commands)
        elif _dashed(key) in every:
            if _dashed(key) in values:
                raise ConfigError(
                    f"{path} says {_dashed(key)} twice, with dashes and with underscores; say it once"
                )
            values[_dashed(key)] = value
        else:
            raise _unknown(path, "key", key, own, every)
    table: Mapping[str, Any] = content
    for part in ctx.command_path.split()[1:]:
        table = table.get(part, {})
    values |= {_dashed(key): value for key, value in table.items()}
    ctx.default_map = {
        str(own[key].name): _value(path, key, own[key], value) for key, value in values.items() if key in own
    }


def _keys(command: Any) -> dict[str, Any]:
    """The flag or argument that each key of the file stands for."""
    found = {
        name.removeprefix("--"): parameter
        for parameter in command.params
        for name in parameter.opts
        if name.startswith("--")
    }
    found |= {p.name: p for p in command.params if p.param_type_name == "argument"}  # before --model
    return {key: parameter for key, parameter in found.items() if key not in _NO_KEYS}


def _leaves(command: Any) -> list[Any]:
    groups: Mapping[str, Any] = getattr(command, "commands", {})
    return [leaf for inner in groups.values() for leaf in _leaves(inner)] if groups else [command]


def _check_table(path: Path, command: Any, name: str, table: Any) -> None:
    """Refuses what the verb or the group of verbs has not, whichever verb is running."""
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: {name} must be a table, [{name}]")
    inner: Mapping[str, Any] = getattr(command, "commands", {})
    known: Mapping[str, Any] = inner or _keys(command)
    for key, value in table.items():
        if inner and key in inner:
            _check_table(path, inner[key], f"{name}.{key}", value)
        elif inner:
            raise ConfigError(
                f"{path}: {key!r} in [{name}] is for no verb; say "
                + " or ".join(f"[{name}.{verb}]" for verb in inner)
            )
        elif _dashed(key) not in known:
            raise _unknown(path, "key", key, known)


def _value(path: Path, key: str, parameter: Any, value: Any) -> Any:
    """The value as the command line would give it: text, which typer reads and checks."""
    if getattr(parameter, "is_flag", False):
        if isinstance(value, bool):
            return value
        raise ConfigError(f"{path}: {key} must be true or false, not {value!r}")
    if getattr(parameter, "multiple", False):
        texts = [value] if isinstance(value, str) else value
        if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
            return texts
        raise ConfigError(f'{path}: {key} must be text or a list of texts, ["..."], not {value!r}')
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ConfigError(f"{path}: {key} must be text or a number, not {value!r}")
    try:
        return str(value)
    except ValueError:  # hexadecimal numbers may have more digits than decimal ones
        raise ConfigError(f"{path}: the number of {key} has too many digits") from None


def _dashed(key: str) -> str:
    return key.replace("_", "-")


def _unknown(path: Path, kind: str, key: str, *known: Collection[str]) -> ConfigError:
    """known: names to suggest, the nearest to what is running first."""
    for names in known:
        if near := get_close_matches(_dashed(key), names, 1):
            return ConfigError(f"{path} has the unknown {kind} {key!r}; did you mean {near[0]!r}?")
    return ConfigError(f"{path} has the unknown {kind} {key!r}; known: {', '.join(sorted(known[0]))}")
