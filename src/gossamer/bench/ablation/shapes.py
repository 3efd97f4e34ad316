"""Shapes that speed is taken on: a small model sits in caches and hides what a technique does to memory
traffic, so random weights of a usual size run in its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gossamer.errors import ConfigError

__all__ = ["OWN", "SHAPES", "check_shape", "write_shape"]

OWN = "own"
"""Speed is taken on the model itself."""


def _llama(layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, vocab: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "135m": _llama(30, 576, 9, 3, 1536, 49152),
    "1b": _llama(16, 2048, 32, 8, 8192, 128256),
}
"""Name -> its config.json: 135 million and 1.2 billion parameters."""


def check_shape(name: str) -> None:
    """Raises ConfigError for a shape that there is not."""
    if name not in (*SHAPES, OWN):
        raise ConfigError(
            f"speed shape {name!r} is unknown; choose {', '.join(SHAPES)}, or {OWN} for the model itself"
        )


def write_shape(name: str, folder: Path) -> Path:
    """A directory below `folder` with the shape's config.json, for --load-format dummy."""
    check_shape(name)
    directory = folder / name
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(SHAPES[name], indent=2))
    return directory
