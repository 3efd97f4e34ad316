"""A TOML file in place of flags. At the top stand the engine's flags, in a table named after a verb
(`[serve]`, `[bench.latency]`) that verb's own; names are those of the long flags, without dashes in front:

    model = "Qwen/Qwen3-0.6B"
    max-model-len = 4096

    [serve]
    port = 8080
"""

from __future__ import annotations

import tomllib
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import typer

from gossamer.errors import ConfigError

__all__ = ["apply_config_file"]

_HIDDEN = {"config", "help", "ctx", "model_flag"}  # --model is spelled `model`


def apply_config_file(ctx: typer.Context, path: Path) -> None:
    """Makes the file's values the verb's defaults.

    Raises ConfigError for a file that cannot be read and for a key that no flag has.
    """
    from gossamer.cli.engine_flags import EngineFlags

    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    verbs: dict[str, Any] = getattr(ctx.find_root().command, "commands", {})
    shared = {f.name for f in fields(EngineFlags)} - _HIDDEN
    own = {p.name for p in ctx.command.params if p.name} - _HIDDEN
    table: dict[str, Any] = content
    for part in ctx.command_path.split()[1:]:
        table = table.get(part) or {}
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: {part} must be a table, [{part}]")
    top = {key: value for key, value in content.items() if not isinstance(value, dict)}
    for key in content.keys() - top.keys():
        _known(path, "table", key, set(verbs))
    for key in top:
        _known(path, "key", key, shared)
    for key in table:
        _known(path, "key", key, own)
    ctx.default_map = {_name(key): value for key, value in (top | table).items() if _name(key) in own}


def _name(key: str) -> str:
    return key.replace("-", "_")


def _known(path: Path, kind: str, key: str, names: set[str]) -> None:
    if _name(key) in names:
        return
    spelled = sorted(name.replace("_", "-") for name in names)
    near = get_close_matches(key.replace("_", "-"), spelled, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(spelled)}"
    raise ConfigError(f"{path} has the unknown {kind} {key!r}; {hint}")
