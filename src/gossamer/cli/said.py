"""Which engine flags the user has said, and what of a plan they decide."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

import typer

from gossamer.cli.engine_flags import EngineFlags

if TYPE_CHECKING:
    from gossamer.config import EngineConfig

__all__ = ["decided", "said_flags"]

_DECIDES = {
    "dtype": "weights", "quantization": "weights", "weight_format": "weights", "kv_cache_dtype": "kv",
    "max_num_seqs": "seqs", "max_num_batched_tokens": "tokens", "max_model_len": "context",
    "kv_bytes": "kv_bytes", "speculative_config": "speculation",
}  # fmt: skip


def said_flags(ctx: typer.Context) -> tuple[tuple[str, str], ...]:
    """(long flag, value) of every engine flag but the model that the command line, the environment or a file
    gives; "true" and "false" for flags without a value."""
    found: list[tuple[str, str]] = []
    for _, parameter, value in _said(ctx):
        long = next(o for o in parameter.opts if o.startswith("--")).removeprefix("--")
        values = value if isinstance(value, list | tuple) else [value]
        found += [(long, str(v).lower() if isinstance(v, bool) else str(v)) for v in values]
    return tuple(found)


def decided(ctx: typer.Context, config: EngineConfig) -> frozenset[str]:
    """What of `planner.space.DECIDED` these flags decide. A goal for the time between tokens decides how much
    runs at once: it adapts that itself."""
    found = {_DECIDES[name] for name, _, _ in _said(ctx) if name in _DECIDES}
    if config.dynamic_batching is not None and config.dynamic_batching.itl_goal_ms is not None:
        found |= {"seqs", "tokens"}
    return frozenset(found)


def _said(ctx: typer.Context) -> list[tuple[str, Any, Any]]:
    """(field of EngineFlags, parameter, value) of what was given."""
    own = {field.name for field in fields(EngineFlags)} - {"model", "model_flag"}
    found = []
    for parameter in ctx.command.params:
        name = str(parameter.name)
        source = ctx.get_parameter_source(name)
        if name in own and source is not None and source.name != "DEFAULT":
            found.append((name, parameter, ctx.params[name]))
    return found
