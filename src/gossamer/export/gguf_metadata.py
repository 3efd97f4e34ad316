"""config.json as the metadata of a GGUF file, and the tensors that rotary scalings are there.

What cannot be said in it is refused: the graph that the metadata gives must be the model's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer.checkpoint.gguf_config import llama3_factors, model_config, yarn_gain
from gossamer.checkpoint.gguf_file import GGUFTensor
from gossamer.checkpoint.gguf_names import FACTORS, Architecture
from gossamer.errors import UnsupportedModelError
from gossamer.graph.families import build_graph
from gossamer.graph.ir import Graph, Weight
from gossamer.graph.weights import Constant

__all__ = ["check_metadata", "factor_tensors", "model_metadata"]

Floats = npt.NDArray[np.float32]
_THETA = {"MixtralForCausalLM": 1e6, "Gemma3ForCausalLM": 1e6}
_NEAR = 3e-7  # numbers there are float32
_RMS, _ROPE = "attention.layer_norm_rms_epsilon", "rope.scaling."


@dataclass(frozen=True, slots=True)
class _Sketch:
    """A file that is not written yet, for `model_config`."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]
    map: bytes


def model_metadata(config: Mapping[str, Any], graph: Graph, found: Architecture) -> dict[str, Any]:
    """The keys of the architecture, "llama.block_count" and so on. graph: the model's, before any pass."""
    attention = next(n for n in graph.nodes if n.op == "attention").attrs
    heads, dim = attention["heads"], attention["head_dim"]
    norm = next(n for n in graph.nodes if n.op in ("rms_norm", "layer_norm"))
    ffn = config.get("intermediate_size") or config.get("n_inner") or 4 * graph.hidden
    values: dict[str, Any] = {
        "block_count": graph.layers,
        "context_length": graph.max_positions,
        "embedding_length": graph.hidden,
        "feed_forward_length": ffn,
        "attention.head_count": heads,
        "vocab_size": graph.vocab,
    }
    if found.name == "gpt2":
        values["attention.layer_norm_epsilon"] = float(norm.attrs["eps"])
    else:
        turned = int(dim * config.get("partial_rotary_factor", 1.0))
        theta = float(config.get("rope_theta") or _THETA.get(config["architectures"][0], 10000.0))
        values |= {
            "attention.head_count_kv": graph.kv_groups[0].kv_heads,
            _RMS: float(norm.attrs["eps"]),
            "attention.key_length": dim,
            "attention.value_length": dim,
            "rope.dimension_count": turned,
            "rope.freq_base": theta,
        }
        values |= _scaling(config, graph)
    windows = {g.window for g in graph.kv_groups if g.window is not None}
    if len(windows) == 1 and found.name not in ("qwen2", "qwen3", "qwen3moe"):
        values["attention.sliding_window"] = windows.pop()
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(key) or (found.name == "gemma2" and key not in config):
            values[key] = float(config.get(key, 50.0 if key.startswith("attn") else 30.0))
    if found.name == "gemma3" and config.get("rope_local_base_freq"):
        values["rope.freq_base_swa"] = float(config["rope_local_base_freq"])
    experts = next((n.attrs for n in graph.nodes if n.op == "top_k_experts"), None)
    if experts is not None:
        stack = next(n for n in graph.nodes if n.op == "experts").weights[0]
        count, width, _ = graph.weights[stack].shape
        values |= {"expert_count": count, "expert_used_count": experts["k"]}
        values |= {"expert_feed_forward_length": width} if found.name == "qwen3moe" else {}
    return {f"{found.name}.{key}": value for key, value in values.items()}


def factor_tensors(config: Mapping[str, Any], graph: Graph) -> dict[str, Floats]:
    """Tensors by which rotary frequencies are divided: of llama3's scaling, and longrope's two."""
    scaling = config.get("rope_scaling") or {}
    match _kind(scaling):
        case "llama3":
            attention = next(n for n in graph.nodes if n.op == "attention").attrs
            edges = tuple(
                float(scaling[f"{name}"])
                for name in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            )
            theta = float(config.get("rope_theta") or 10000.0)
            return {FACTORS[0]: llama3_factors(scaling["factor"], attention["head_dim"], theta, *edges)}
        case "longrope" | "su":
            names = zip(FACTORS[1:], ("long_factor", "short_factor"), strict=True)
            return {tensor: np.asarray(scaling[name], np.float32) for tensor, name in names}
    return {}


def check_metadata(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    factors: Mapping[str, Floats],
    graph: Graph,
) -> None:
    """The model that the metadata describes is the one that is written. shapes: of the file's tensors.

    Raises UnsupportedModelError naming what differs.
    """
    from gossamer.checkpoint.gguf_blocks import BY_NAME

    data, tensors = b"", {}
    for name, shape in shapes.items():
        values = factors.get(name, np.zeros(0, np.float32)).tobytes()
        tensors[name] = GGUFTensor(name, BY_NAME["F32"][1], shape, len(data), len(data) + len(values))
        data += values
    made = build_graph(model_config(_Sketch(Path(graph.name), metadata, tensors, data)), name=graph.name)
    problem = _difference(graph, made)
    if problem:
        raise UnsupportedModelError(
            f"GGUF cannot hold {graph.name}: {problem}; its readers would compute something else"
        )


def _difference(ours: Graph, other: Graph) -> str | None:
    for a, b in zip(ours.nodes, other.nodes, strict=False):
        attrs = [
            f"{key} {value} ({b.attrs.get(key)} there)"
            for key, value in a.attrs.items()
            if not _near(value, b.attrs.get(key))
        ]
        if attrs or replace(a, attrs=b.attrs) != b:
            return f"{a.outputs[0]} has {', '.join(attrs) or 'other weights'}"
    if len(ours.nodes) != len(other.nodes):
        return "it has other layers"
    for name, weight in ours.weights.items():
        if not _same(weight, other.weights[name]):
            return f"the weight {name} is another one"
    for field in ("kv_groups", "max_positions", "vocab"):
        if getattr(ours, field) != getattr(other, field):
            return f"its {field} would be {getattr(other, field)} instead of {getattr(ours, field)}"
    return None


def _near(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=_NEAR)
    return bool(a == b)


def _same(a: Weight, b: Weight) -> bool:
    if isinstance(a.expr, Constant) and isinstance(b.expr, Constant):
        return np.allclose(a.expr.values, b.expr.values, rtol=_NEAR, atol=0)
    return a.expr == b.expr


def _kind(scaling: Mapping[str, Any]) -> str:
    return str(scaling.get("rope_type", scaling.get("type", "default")))


def _magnitude(graph: Graph) -> float:
    return float(next(n for n in graph.nodes if n.op == "rope").attrs["magnitude"])


def _scaling(config: Mapping[str, Any], graph: Graph) -> dict[str, Any]:
    scaling = config.get("rope_scaling") or {}
    original = "original_max_position_embeddings"
    match _kind(scaling):
        case "default" | "llama3":
            return {}
        case "linear":
            return {f"{_ROPE}type": "linear", f"{_ROPE}factor": float(scaling["factor"])}
        case "yarn":
            length = scaling.get(original) or graph.max_positions
            factor = float(scaling["factor"])
            gain = _magnitude(graph) / yarn_gain(factor)
            made = {f"{_ROPE}type": "yarn", f"{_ROPE}factor": factor}
            made[f"{_ROPE}original_context_length"] = int(length)
            if not math.isclose(gain, 1, rel_tol=_NEAR):
                made[f"{_ROPE}attn_factor"] = gain
            edges = [end for end in ("fast", "slow") if scaling.get(f"beta_{end}")]
            return made | {f"{_ROPE}yarn_beta_{end}": float(scaling[f"beta_{end}"]) for end in edges}
        case "longrope" | "su":
            length = config.get(original) or scaling.get(original) or graph.max_positions
            return {
                f"{_ROPE}type": "longrope",
                f"{_ROPE}original_context_length": int(length),
                f"{_ROPE}attn_factor": _magnitude(graph),
            }
    raise UnsupportedModelError(
        f"GGUF cannot hold the rope scaling {_kind(scaling)!r}; it knows linear, yarn, llama3 and longrope"
    )
