"""A checkpoint of a given shape with deterministic random weights, as every peer reads it: config.json,
bf16 safetensors under the family's own names, and a tokenizer (some exporters insist on one)."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from gossamer.checkpoint.safetensors_writer import LazyTensor, write_safetensors
from gossamer.checkpoint.weights import DummySource
from gossamer.graph.families import build_graph
from gossamer.graph.weights import leaves

__all__ = ["write_checkpoint"]


def write_checkpoint(config: Path, target: Path, tokenizer: Path | None) -> None:
    """Writes directory `target` for a config.json, once. Raises GossamerError for an unsupported shape."""
    if (target / "model.safetensors").is_file():
        return
    target.mkdir(parents=True, exist_ok=True)
    graph = build_graph(json.loads(config.read_text()))
    source = DummySource(graph)
    tensors = {leaf.name: leaf.shape for w in graph.weights.values() for leaf in leaves(w.expr)}
    shutil.copyfile(config, target / "config.json")
    if tokenizer is not None:
        for file in tokenizer.glob("*.json"):
            shutil.copyfile(file, target / file.name)
    write_safetensors(
        target / "model.safetensors",
        {name: LazyTensor("BF16", shape, partial(_bf16, source, name)) for name, shape in tensors.items()},
        {"format": "pt"},
    )


def _bf16(source: DummySource, name: str) -> npt.NDArray[Any]:
    return np.asarray(source.read(name)).astype(ml_dtypes.bfloat16)
