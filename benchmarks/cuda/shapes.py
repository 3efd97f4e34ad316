"""Models as their config.json says they are, without a download: weights are random ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["SHAPES", "shape_of", "write_shape"]

_COMMON: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "attention_bias": False, "mlp_bias": False, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "max_position_embeddings": 131072, "vocab_size": 128256, "num_key_value_heads": 8,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
_TINY: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64, "max_position_embeddings": 512,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "head_dim": 64, "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "head_dim": 128,
    },
    "llama-3.1-70b": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "head_dim": 128,
    },
    "tiny": _TINY,
    "tiny-deep": _TINY | {"num_hidden_layers": 4},
}  # fmt: skip
"""Plain rotary embedding for all: the scaling of Llama 3.1 changes numbers, not work."""


def shape_of(name: str, *, tiny: bool = False) -> dict[str, Any]:
    """Its config.json. tiny: of what stands for it in the interpreter, with layers enough for streaming where
    the shape is one that must be streamed."""
    if tiny:
        name = "tiny-deep" if name == "llama-3.1-70b" else "tiny"
    return _COMMON | SHAPES[name]


def write_shape(name: str, directory: Path, *, tiny: bool = False) -> Path:
    """A directory with the `shape_of` a name as config.json."""
    target = directory / name
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(shape_of(name, tiny=tiny), indent=1))
    return target
