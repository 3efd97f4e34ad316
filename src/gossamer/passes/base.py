"""What a pass is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gossamer.config import EngineConfig
from gossamer.graph.ir import Graph

__all__ = ["Pass"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One structural technique. wanted: whether a configuration switches it on; after, before: names of
    passes it must follow or precede where they run too."""

    name: str
    wanted: Callable[[EngineConfig], bool]
    run: Callable[[Graph, EngineConfig], Graph]
    after: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
