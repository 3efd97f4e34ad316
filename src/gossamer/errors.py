"""The errors a user can meet, as one family.

Everything that is the user's to mend derives from `GossamerError`: the command line prints its message
and exits with 2, the server answers 4xx. Anything else is our fault (exit 1, HTTP 500).
A message names the value given, what is allowed and the next step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ConflictError",
    "ContextLengthError",
    "DependencyError",
    "GossamerError",
    "GraphError",
    "MemoryBudgetError",
    "NotBuiltError",
    "QueueFullError",
    "RequestError",
    "TokenizerError",
    "ToolTemplateError",
    "UnsupportedModelError",
]


class GossamerError(Exception):
    """Base of every error that a user can mend."""


class ConfigError(GossamerError):
    """An option or a combination of options that cannot be."""


class ConflictError(ConfigError):
    """Options that are right by themselves and cannot be together.

    reasons: every one that applies; ways: the nearest combinations that can be, each as changes that one
    types ("with --backend cpu", "without --dtype"), the nearest first; nearest: that one, field -> value,
    where fields of EngineConfig contradict each other.
    """

    def __init__(
        self,
        reasons: Sequence[str],
        ways: Sequence[Sequence[str]],
        nearest: Mapping[str, object] | None = None,
    ) -> None:
        self.reasons, self.ways = tuple(reasons), tuple(map(tuple, ways))
        self.nearest = dict(nearest or {})
        near = ", or ".join(" and ".join(way) for way in self.ways)
        super().__init__("; ".join(self.reasons) + (f". Nearest that can be: {near}" if near else ""))

    def __reduce__(self) -> tuple[type[ConflictError], tuple[object, ...]]:
        return type(self), (self.reasons, self.ways, self.nearest)  # so that processes can hand it on


class CheckpointError(GossamerError):
    """Files of a model that are missing, damaged, hostile or not what config.json says."""


class TokenizerError(CheckpointError):
    """Tokenizer or chat template that is missing or cannot be read."""


class UnsupportedModelError(GossamerError):
    """An architecture or a config.json field that no family here understands."""


class RequestError(GossamerError):
    """A request whose prompt or sampling parameters are invalid."""


class ContextLengthError(RequestError):
    """A prompt that does not fit into the model's context."""


class ToolTemplateError(RequestError):
    """Tools for a chat template that does not show the model any."""


class QueueFullError(GossamerError):
    """More requests than the queue may hold; try again later."""


class MemoryBudgetError(GossamerError):
    """More memory than the machine or the given budget has; says what would fit."""


class DependencyError(GossamerError):
    """A package of an extra that is not installed; says which."""


class NotBuiltError(GossamerError):
    """Something that is planned but does not exist yet."""


class GraphError(Exception):
    """A graph that breaks its own rules: our mistake, never the user's."""
