"""A model as a planner sees it: its graph and what is known of its quality, from config.json alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gossamer.config import EngineConfig
from gossamer.graph.ir import Graph
from gossamer.runtime.start import load_planned_graph

if TYPE_CHECKING:
    from gossamer.quality.certificate import Certificate

__all__ = ["PlannedModel", "open_planned"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedModel:
    """graph: before any pass, quantized where the checkpoint is. directory: holds config.json at least.
    complete: whether its weights are there too."""

    name: str
    graph: Graph
    directory: Path
    certificate: Certificate | None
    complete: bool


def open_planned(config: EngineConfig) -> PlannedModel:
    """The model of a configuration. Of a hub id that is not here config.json is fetched and nothing else.

    Raises UnsupportedModelError (which ops or fields are missing), CheckpointError.
    """
    from gossamer.quality.certificate import read_certificate

    graph, directory, complete = load_planned_graph(config)
    return PlannedModel(
        name=config.model,
        graph=graph,
        directory=directory,
        certificate=read_certificate(directory),
        complete=complete,
    )
