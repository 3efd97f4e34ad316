"""Configurations that the byte plan is held against (benchmarks/memory_plan.py)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gossamer.runtime.process_memory import Kind

__all__ = ["Case", "cases"]

_MODELS = Path(__file__).resolve().parents[2] / "shared" / "models"
_FLAGS = {"load_format": "--load-format", "kv_cache_dtype": "--kv-cache-dtype"}


@dataclass(frozen=True, slots=True)
class Case:
    """Options of gossamer.llm.engine_config, by JSON, and in what process they run."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    kind: Kind = "library"

    def flags(self) -> list[str]:
        """The options as those of the command line."""
        words = [str(self.options["model"])]
        for name, value in self.options.items():
            if name == "weight_cache":
                words += [] if value else ["--no-weight-cache"]
            elif name != "model":
                words += [f"--{name.replace('_', '-')}", str(value)]
        return words


def cases() -> Iterator[Case]:
    """All that can be measured here."""
    yield from _of("pocket", "gossamer/pocket", _POCKET)
    if (_MODELS / "stories260K").is_dir():
        yield from _of("stories260K", str(_MODELS / "stories260K"), _STORIES)
    for shape, variants in _SHAPES.items():
        if (_MODELS / "shapes" / shape).is_dir():
            yield from _of(shape, str(_MODELS / "shapes" / shape), variants, load_format="dummy")


def _of(name: str, model: str, variants: dict[str, dict[str, Any]], **common: Any) -> Iterator[Case]:
    for variant, options in variants.items():
        options = dict(options)
        kind: Kind = options.pop("kind", "library")
        yield Case(
            f"{name} {variant}",
            {"model": model, "weight_cache": False} | common | {"max_model_len": 512} | options,
            kind,
        )


_DRAFT = {"method": "draft_model", "model": "gossamer/pocket-half", "num_speculative_tokens": 3}
_POCKET: dict[str, dict[str, Any]] = {
    "as stored": {},
    "f32": {"dtype": "float32"},
    "int8, int8 KV": {"quantization": "int8", "kv_cache_dtype": "int8"},
    "int4, int4 KV": {"quantization": "int4-g32", "kv_cache_dtype": "int4"},
    "nf4, f32 KV": {"quantization": "nf4", "kv_cache_dtype": "float32"},
    "int4, 8 sequences of 256": {"quantization": "int4", "max_num_seqs": 8, "max_model_len": 256},
    "int4, pages of 64": {"quantization": "int4", "page_size": 64, "max_num_seqs": 16},
    "mixed": {"quantization": "int4", "weight_formats": {"head": "bf16", "layers.*.mlp.*": "int8"}},
    "no memory reuse": {"memory_reuse": None},
    "no fusion": {"operator_fusion": None, "layer_fusion": None, "quantization": "int8"},
    "contiguous KV": {"paged_attention": None, "max_num_seqs": 16},
    "no prefix cache": {"enable_prefix_caching": False},
    "2048 tokens a step": {"max_num_batched_tokens": 2048},
    "128 sequences": {"max_num_seqs": 128, "max_model_len": 128},
    "draft": {"speculative_config": _DRAFT},
    "head": {"speculative_config": {"method": "eagle", "num_speculative_tokens": 3}},
    "n-grams, scalar, 1 thread": {
        "speculative_config": {"method": "ngram"}, "isa": "scalar", "threads": 1, "max_num_seqs": 2,
    },
    "swap": {"swap_bytes": 32 << 20, "kv_bytes": 8 << 20},
    "served": {"kind": "server"},
    "served int4, int8 KV": {"kind": "server", "quantization": "int4", "kv_cache_dtype": "int8"},
}  # fmt: skip
_STORIES: dict[str, dict[str, Any]] = {
    "as stored": {},
    "int8, f16 KV": {"quantization": "int8", "kv_cache_dtype": "float16", "max_num_seqs": 256},
    "served": {"kind": "server", "max_num_seqs": 64},
}
_SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "smollm2-135m": {
        "bf16": {"dtype": "bfloat16", "max_num_seqs": 8},
        "int8, 64 sequences": {"quantization": "int8", "max_num_seqs": 64, "max_model_len": 128},
        "int4, pages of 128": {"quantization": "int4-g64", "page_size": 128, "max_num_seqs": 8},
        "cached on disk": {"quantization": "int8", "weight_cache": True, "max_num_seqs": 4},
        "served": {"quantization": "int4", "max_num_seqs": 8, "kind": "server"},
    },
    "qwen3-0.6b": {
        "bf16, int8 KV": {
            "dtype": "bfloat16", "kv_cache_dtype": "int8", "max_num_seqs": 4, "max_model_len": 128,
        },
        "int4": {"quantization": "int4", "max_num_seqs": 8, "max_model_len": 128},
        "uint4, few pages": {"quantization": "uint4-g128", "max_num_seqs": 2, "max_model_len": 128},
    },
    "llama-3.2-1b": {
        "int4, int4 KV": {
            "quantization": "int4", "kv_cache_dtype": "int4", "max_num_seqs": 4, "max_model_len": 128,
        },
        "int8": {"quantization": "int8", "max_num_seqs": 4, "max_model_len": 128},
        "f32": {"dtype": "float32", "max_num_seqs": 2, "max_model_len": 64},
    },
}  # fmt: skip
