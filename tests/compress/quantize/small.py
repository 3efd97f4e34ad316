"""Small models on disk, jobs over them, and what a step wrote, read without the project's readers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from gossamer.backends.reference import ReferenceModel, export_tensors
from gossamer.checkpoint.hub import read_quantization
from gossamer.checkpoint.model_writer import write_config, write_weights
from gossamer.checkpoint.safetensors import Checkpoint
from gossamer.checkpoint.weights import DummySource
from gossamer.compress.step import Job
from gossamer.graph.families import build_graph
from tests.checkpoint.coded import SIZES as ONE_LAYER

SIZES = {**ONE_LAYER, "num_hidden_layers": 2}  # so that a second one sees what became of the first

CONFIGS: dict[str, tuple[str, Callable[[], Any]]] = {
    "llama": ("LlamaForCausalLM", lambda: transformers.LlamaConfig(**SIZES)),
    "tied": ("LlamaForCausalLM", lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "phi3": ("Phi3ForCausalLM", lambda: transformers.Phi3Config(**SIZES, pad_token_id=0)),
    "mixtral": ("MixtralForCausalLM", lambda: transformers.MixtralConfig(**SIZES, num_local_experts=3)),
    "gpt2": (
        "GPT2LMHeadModel",
        lambda: transformers.GPT2Config(vocab_size=101, n_embd=64, n_layer=2, n_head=4, n_positions=64),
    ),
}


def make_model(directory: Path, name: str) -> Path:
    """A model of random weights."""
    architecture, config = CONFIGS[name]
    raw = {**config().to_dict(), "architectures": [architecture]}
    graph = build_graph(raw)
    directory.mkdir(exist_ok=True)
    write_weights(directory, export_tensors(ReferenceModel.load(graph, DummySource(graph))))
    write_config(directory, raw)
    return directory


def make_job(model: Path, place: Path, **fields: Any) -> Job:
    """A job with text, in new directories below `place` (scratch is kept where it is there)."""
    out = place / "out"
    out.mkdir(parents=True, exist_ok=True)
    (place / "scratch").mkdir(exist_ok=True)
    text = np.random.default_rng(0).integers(3, 101, 2000).astype(np.int32)
    given: dict[str, Any] = {
        "model": model, "original": model, "out": out, "scratch": place / "scratch", "text": text,
        "context": 32, "samples": 16, "seed": 0, "threads": 1,
    }  # fmt: skip
    return Job(**{**given, **fields})


def floats_of(directory: Path) -> dict[str, np.ndarray]:
    """Every tensor of a compressed-tensors checkpoint as floats, by its documented layout."""
    checkpoint = Checkpoint(directory)
    settings = read_quantization(directory)
    assert settings is not None
    groups = settings["config_groups"].values()
    schemes = {target: group["weights"] for group in groups for target in group["targets"]}
    out = {}
    for name in checkpoint.names():
        module, _, kind = name.rpartition(".")
        if kind == "weight_packed":
            bits = schemes[module]["num_bits"]
            n, k = checkpoint.read(f"{module}.weight_shape")
            words = checkpoint.read(name).view(np.uint32)
            codes = np.stack([words >> (bits * i) & (2**bits - 1) for i in range(32 // bits)], -1)
            codes = codes.reshape(n, -1)[:, :k].astype(np.float32)
            if schemes[module]["symmetric"]:
                zeros = np.full((n, 1), 2 ** (bits - 1), np.float32)
            else:
                packed = checkpoint.read(f"{module}.weight_zero_point").view(np.uint32)
                zeros = np.stack([packed >> (4 * i) & 15 for i in range(8)], 1).reshape(-1, packed.shape[1])
                zeros = zeros[:n].astype(np.float32)
            scales = checkpoint.read(f"{module}.weight_scale").astype(np.float32)
            width = k // scales.shape[1]
            out[f"{module}.weight"] = (codes - zeros.repeat(k // zeros.shape[1], 1)) * scales.repeat(width, 1)
        elif kind == "weight" and module in schemes:
            scales = checkpoint.read(f"{module}.weight_scale")
            out[name] = checkpoint.read(name).astype(np.float32) * scales
        elif not kind.startswith("weight_"):
            out[name] = checkpoint.read(name)
    return out
