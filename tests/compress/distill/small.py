"""Small models, texts and runs for the tests of training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer.backends.reference import ReferenceModel
from gossamer.checkpoint.model_writer import write_weights
from gossamer.checkpoint.weights import DummySource
from gossamer.compress.step import Job
from gossamer.graph.families import build_graph
from gossamer.graph.weights import leaves
from tests.graph.small import llama_config

VOCAB = 101


def text(count: int = 6000, seed: int = 0) -> npt.NDArray[np.int32]:
    """Tokens of which each says much about the next."""
    random = np.random.default_rng(seed)
    steps = random.choice([1, 1, 1, 2, 7], count)
    return (np.cumsum(steps) % VOCAB).astype(np.int32)


def model(seed_fields: dict[str, Any] | None = None) -> ReferenceModel:
    graph = build_graph(llama_config(num_hidden_layers=2, **(seed_fields or {})), name="small")
    return ReferenceModel.load(graph, DummySource(graph))


def directory(at: Path, change: Callable[[str, npt.NDArray[Any]], Any] | None = None, **fields: Any) -> Path:
    """A model's directory without a tokenizer; change(name, tensor) gives what is written instead."""
    config = llama_config(num_hidden_layers=2, tie_word_embeddings=True, **fields)
    graph = build_graph(config)
    source = DummySource(graph)
    names = {leaf.name for weight in graph.weights.values() for leaf in leaves(weight.expr)}
    tensors = {name: source.read(name) for name in sorted(names)}
    at.mkdir(parents=True)
    write_weights(at, {n: a if change is None else change(n, a) for n, a in tensors.items()})
    (at / "config.json").write_text(json.dumps(config))
    return at


def job(at: Path, model: Path, **fields: Any) -> Job:
    """A job in folders of its own."""
    for name in ("out", "scratch"):
        (at / name).mkdir(parents=True, exist_ok=True)
    return Job(
        **{
            "model": model, "original": model, "out": at / "out", "scratch": at / "scratch", "text": text(),
            "context": 16, "samples": 4, "seed": 1, "threads": 1, **fields,
        }
    )  # fmt: skip
