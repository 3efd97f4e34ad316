"""What a model's directory holds: its content's hash, how many numbers in how many bytes, how many zeros."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer.checkpoint.gguf_directory import POINTER
from gossamer.checkpoint.json_file import read_json_object
from gossamer.checkpoint.safetensors import INDEX, SINGLE
from gossamer.checkpoint.weights import WeightSource, evaluate
from gossamer.config import EngineConfig
from gossamer.graph.ir import Graph, Weight
from gossamer.graph.weights import Constant, leaves
from gossamer.quality.report import Count, Positive, Share
from gossamer.runtime.start import load_graph

__all__ = ["ModelRecord", "content_hash", "model_record", "sparsity"]

_BESIDE = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
           "tokenizer.model", "vocab.json", "merges.txt", "special_tokens_map.json")  # fmt: skip
_PIECE = 1 << 22  # numbers looked at together


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRecord:
    """A model by name and content. bytes: of its weight files; bits_per_weight: of those for each parameter,
    scales and vectors included; sparsity: share of zeros in the matrices of its blocks."""

    name: str
    architecture: str
    sha256: str
    bytes: Count
    parameters: Count
    bits_per_weight: Positive
    sparsity: Share


def model_record(directory: Path, name: str) -> ModelRecord:
    """The record of a model's directory, whose weights are read once. Raises CheckpointError,
    UnsupportedModelError for what is no model."""
    graph, directory, source = load_graph(EngineConfig(model=str(directory)))
    size = sum(path.stat().st_size for path in _weights(directory))
    parameters = sum(prod(w.shape) for w in graph.weights.values() if not isinstance(w.expr, Constant))
    return ModelRecord(
        name=name,
        architecture=graph.family,
        sha256=content_hash(directory),
        bytes=size,
        parameters=parameters,
        bits_per_weight=round(8 * size / parameters, 4),
        sparsity=round(sparsity(graph, source), 6),
    )


def content_hash(directory: Path) -> str:
    """SHA-256 over names and SHA-256 of the files that make up a model: weights, config and tokenizer. Raises
    CheckpointError for a directory without weights."""
    whole = hashlib.sha256()
    beside = [path for name in _BESIDE if (path := directory / name).is_file()]
    for path in sorted([*_weights(directory), *beside], key=lambda path: path.name):
        with path.open("rb") as file:
            whole.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()


def sparsity(graph: Graph, source: WeightSource) -> float:
    """Share of zeros in the matrices of a graph's blocks, read some rows at a time."""
    zeros = numbers = 0
    for weight in _matrices(graph):
        for rows in _rows(weight, source):
            zeros += rows.size - int(np.count_nonzero(rows))
            numbers += rows.size
        for leaf in leaves(weight.expr):
            source.release(leaf.name)
    return zeros / max(numbers, 1)


def _matrices(graph: Graph) -> list[Weight]:
    names = dict.fromkeys(name for node in graph.nodes if node.scope for name in node.weights)
    return [graph.weights[name] for name in names if len(graph.weights[name].shape) > 1]


def _rows(weight: Weight, source: WeightSource) -> Iterator[npt.NDArray[Any]]:
    step = max(1, _PIECE // prod(weight.shape[1:]))
    for start in range(0, weight.shape[0], step):
        yield evaluate(weight.expr, source, start, min(start + step, weight.shape[0]))


def _weights(directory: Path) -> list[Path]:
    """The files that `open_checkpoint` reads weights from."""
    if (directory / POINTER).is_file():
        return [Path(read_json_object(directory / POINTER)["file"])]
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    return sorted({directory / shard for shard in read_json_object(directory / INDEX)["weight_map"].values()})
