"""A step's model: its directory as a graph and where the weights come from."""

from __future__ import annotations

from pathlib import Path

from gossamer.checkpoint.hub import read_config
from gossamer.checkpoint.safetensors import Checkpoint
from gossamer.checkpoint.weights import as_stored, check_tensors
from gossamer.errors import ConfigError
from gossamer.graph.families import build_graph
from gossamer.graph.families.names import fit_names
from gossamer.graph.ir import Graph

__all__ = ["check_floats", "open_model"]


def open_model(directory: Path) -> tuple[Graph, Checkpoint]:
    """The graph before any pass, under the checkpoint's own tensor names.

    Raises UnsupportedModelError, CheckpointError.
    """
    graph = build_graph(read_config(directory), name=str(directory))
    checkpoint = Checkpoint(directory)
    graph = fit_names(graph, checkpoint.names())
    check_tensors(graph, {name: checkpoint.info(name).shape for name in checkpoint.names()})
    return as_stored(graph, checkpoint), checkpoint


def check_floats(graph: Graph, doing: str) -> None:
    """Raises ConfigError for a model that is quantized already, which `doing` cannot follow."""
    for weight in graph.weights.values():
        if weight.format != "f32":
            raise ConfigError(
                f"{weight.name} is stored as {weight.stored}, and {doing} works on floats; begin with the "
                "model that it was quantized from, and quantize last"
            )
