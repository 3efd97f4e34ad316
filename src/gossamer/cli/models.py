"""What verbs must know of a model before it is started."""

from __future__ import annotations

from collections.abc import Callable

from gossamer.cli.engine_flags import EngineFlags
from gossamer.cli.show import stderr

__all__ = ["fitting_input_len", "model_context", "say_input_len", "served_context"]


def model_context(flags: EngineFlags, default: str | None = None) -> int:
    """Longest sequence of the model that the flags name. Raises GossamerError where it cannot be read."""
    from gossamer.checkpoint.hub import read_config, resolve_model
    from gossamer.graph.families import build_graph

    config = flags.config(model=default)
    raw = read_config(resolve_model(config.model, config.revision))
    return build_graph(raw, name=config.model, ignore=config.ignore_config_fields).max_positions


def served_context(flags: EngineFlags) -> int:
    """The same, or --max-model-len where that is less."""
    context = model_context(flags)
    return context if flags.max_model_len is None else min(context, flags.max_model_len)


def fitting_input_len(usual: int, fits: Callable[[int], bool]) -> int:
    """The --input-len of a workload where none was given: the most up to the usual one that fits. Where
    nothing does, the usual one, whose refusal names the flags."""
    return next((count for count in range(usual, 0, -1) if fits(count)), usual)


def say_input_len(given: int | None, used: int, usual: int) -> None:
    """Says that the model serves less than the usual workload takes, where that is so."""
    if given is None and used < usual:
        stderr().print(f"--input-len {used} instead of {usual}, as the context holds no more", soft_wrap=True)
