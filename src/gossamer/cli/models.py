"""What verbs must know of a model before it is started."""

from __future__ import annotations

from gossamer.cli.engine_flags import EngineFlags

__all__ = ["model_context"]


def model_context(flags: EngineFlags, default: str | None = None) -> int:
    """Longest sequence of the model that the flags name. Raises GossamerError where it cannot be read."""
    from gossamer.checkpoint.hub import read_config, resolve_model
    from gossamer.graph.families import build_graph

    config = flags.config(model=default)
    raw = read_config(resolve_model(config.model, config.revision))
    return build_graph(raw, name=config.model, ignore=config.ignore_config_fields).max_positions
