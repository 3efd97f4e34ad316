"""A step's model: its directory as a graph and where the weights come from."""

from __future__ import annotations

from pathlib import Path

from gossamer.checkpoint.hub import read_config
from gossamer.checkpoint.opening import open_checkpoint
from gossamer.checkpoint.weights import ModelSource, as_stored, check_tensors
from gossamer.compress.step import Ids, Job
from gossamer.errors import ConfigError
from gossamer.graph.families import build_graph
from gossamer.graph.families.names import fit_names
from gossamer.graph.ir import Graph

__all__ = ["calibration", "check_floats", "open_model"]


def open_model(directory: Path) -> tuple[Graph, ModelSource]:
    """The graph before any pass, under the checkpoint's own tensor names.

    Raises UnsupportedModelError, CheckpointError.
    """
    graph = build_graph(read_config(directory), name=str(directory))
    checkpoint = open_checkpoint(directory)
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


def calibration(graph: Graph, job: Job) -> Ids:
    """The job's windows [samples, context].

    Raises ConfigError for too little text, windows that the model cannot read or tokens that it lacks.
    """
    if job.context > graph.reach:
        raise ConfigError(
            f"calibration windows are {job.context} tokens, and the model reads {graph.reach} at most; give "
            "a shorter context in the recipe's [data]"
        )
    windows = job.calibration()
    if windows.max() >= graph.vocab:
        raise ConfigError(
            f"the calibration text has token {windows.max()}, and the model's vocabulary has {graph.vocab}; "
            "the tokenizer beside the model is another model's"
        )
    return windows
