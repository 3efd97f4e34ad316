"""The models of a step as torch modules, and the trained one as a directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from gossamer.backends.reference import ReferenceModel, export_tensors
from gossamer.checkpoint.json_file import read_json_object
from gossamer.checkpoint.model_writer import copy_beside, write_config, write_weights
from gossamer.checkpoint.opening import open_checkpoint
from gossamer.checkpoint.safetensors import DTYPES
from gossamer.checkpoint.safetensors_writer import LazyTensor
from gossamer.checkpoint.weights import ModelSource
from gossamer.errors import CheckpointError
from gossamer.graph.ir import Graph
from gossamer.graph.weights import leaves

__all__ = ["begin", "load_model", "student_config", "write_model"]

_INTO_RESIDUAL = ("out_proj", "down_proj")
_DEVIATION = 0.02  # of random weights where config.json names none


def load_model(graph: Graph, source: ModelSource) -> ReferenceModel:
    """The model in float32. Raises CheckpointError for weights that are not finite."""
    model = ReferenceModel.load(graph, source)
    for name, p in model.named_parameters():
        if not bool(torch.isfinite(p.detach()).all()):
            tensors = ", ".join(leaf.name for leaf in leaves(graph.weights[name].expr))
            raise CheckpointError(f"tensor {tensors} holds NaN or infinity; the checkpoint is damaged")
    return model


def student_config(path: str) -> dict[str, Any]:
    """A student's config.json, or that of a directory. Raises CheckpointError."""
    file = Path(path).expanduser()
    file = file / "config.json" if file.is_dir() else file
    if not file.is_file():
        raise CheckpointError(
            f"no config.json at {path}; distil.student names one, or a directory that holds one"
        )
    return read_json_object(file, cap=4 << 20)


def begin(graph: Graph, config: dict[str, Any], seed: int) -> ReferenceModel:
    """An untrained model: normal matrices (smaller with depth where they lead into the residual: GPT-2),
    norms at 1, biases at 0. config: config.json, for its initializer_range."""
    model = ReferenceModel(graph)
    norms = {node.weights[0] for node in graph.nodes if "norm" in node.op}
    deviation = float(config.get("initializer_range", _DEVIATION))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.fill_(1.0 if name in norms else 0.0)
            else:
                depth = (2 * graph.layers) ** -0.5 if name.endswith(_INTO_RESIDUAL) else 1.0
                p.normal_(0.0, deviation * depth, generator=generator)
    return model


def write_model(model: ReferenceModel, config: dict[str, Any], like: Path, directory: Path) -> int:
    """Fills a model's directory: weights in the dtype they have in `like` (that of most weights there for
    tensors that it lacks), its tokenizer, and config; gives the bytes of all tensors."""
    source = open_checkpoint(like)
    names = source.names()
    usual = max((source.info(name).dtype for name in names), key=[source.info(n).dtype for n in names].count)
    tensors = {}
    for name, array in export_tensors(model).items():
        dtype = source.info(name).dtype if name in names else usual
        tensors[name] = LazyTensor(
            dtype,
            array.shape,
            lambda array=array, dtype=dtype: np.asarray(array).astype(DTYPES[dtype]),  # type: ignore[misc]
        )
    size = write_weights(directory, tensors)
    write_config(directory, config)
    copy_beside(like, directory)
    return size
