"""config.json from the metadata of a GGUF file (key by key as llama.cpp's llama-model.cpp reads them)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gossamer.checkpoint.gguf_file import GGUFTensor
from gossamer.checkpoint.gguf_names import ARCHITECTURES, FACTORS, Architecture, Piece, pieces
from gossamer.checkpoint.safetensors import short
from gossamer.errors import CheckpointError, UnsupportedModelError
from gossamer.graph.families.common import MOST_EXPERTS, MOST_LAYERS

__all__ = [
    "Header",
    "Metadata",
    "architecture",
    "file_pieces",
    "llama3_factors",
    "model_config",
    "query_scalar",
    "yarn_gain",
]

# What says nothing about the numbers of inference, or says again what tensors and vocabulary say.
_INERT = (
    "attention.value_length", "rope.dimension_count", "rope.scaling.finetuned",
    "rope.scaling.original_context_length", "tensor_data_layout", "vocab_size",
)  # fmt: skip
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class Header(Protocol):
    """What is asked of a file, or of one that is not written yet."""

    @property
    def path(self) -> Path: ...
    @property
    def metadata(self) -> Mapping[str, Any]: ...
    @property
    def tensors(self) -> Mapping[str, GGUFTensor]: ...
    @property
    def map(self) -> Any: ...


class Metadata:
    """The keys of an architecture, "embedding_length" for "llama.embedding_length", with their types checked.

    A float32 is read as the shortest decimal that it rounds to: 1e-05, not 9.999999747378752e-06. Raises
    CheckpointError naming the key, its value and what is right.
    """

    def __init__(self, file: Header, prefix: str) -> None:
        self._file, self._prefix = file, prefix
        self._read: set[str] = set()

    def whole(self, name: str, default: int | None = None, most: int = 2**31) -> int:
        """A whole number from 1; also where a list says the same for every layer."""
        value = self._value(name, default)
        if isinstance(value, list) and value and value.count(value[0]) == len(value):
            value = value[0]
        if type(value) is not int or not 1 <= value <= most:
            raise self._wrong(name, value, f"a whole number from 1 to {most}, the same for all layers,")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A number above 0."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e38:
            raise self._wrong(name, value, "a number above 0")
        return float(str(np.float32(value)))

    def has(self, name: str) -> bool:
        """Whether the key is there with a value that is not 0 or empty."""
        return bool(self._file.metadata.get(self._prefix + name))

    def text(self, name: str, default: str) -> str:
        """A string."""
        value = self._value(name, default)
        if not isinstance(value, str):
            raise self._wrong(name, value, "a string")
        return value

    def unread(self) -> dict[str, Any]:
        """Keys of the architecture that nobody asked for and that are not inert."""
        known = {self._prefix + name for name in _INERT} | self._read
        return {
            key: value
            for key, value in self._file.metadata.items()
            if key.startswith(self._prefix) and key not in known
        }

    def _value(self, name: str, default: Any) -> Any:
        key = self._prefix + name
        self._read.add(key)
        value = self._file.metadata.get(key, default)
        if value is None:
            raise CheckpointError(f"{self._file.path}: the key {key} is missing; convert the model again")
        return value

    def _wrong(self, name: str, value: Any, right: str) -> CheckpointError:
        return CheckpointError(
            f"{self._file.path}: {self._prefix}{name} is {short(value)}; {right} is right: convert it again"
        )


def architecture(file: Header) -> Architecture:
    """What the file holds. Raises UnsupportedModelError for an architecture that is not known here, and for
    a part of a model."""
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{file.path} holds the architecture {short(name)}; of GGUF there are {', '.join(ARCHITECTURES)}"
        )
    parts = file.metadata.get("split.count", 0)
    if parts not in (0, 1):
        raise UnsupportedModelError(
            f"{file.path} is one of {short(parts)} parts; put them together with llama.cpp's "
            "`llama-gguf-split --merge`"
        )
    return ARCHITECTURES[name]


def file_pieces(file: Header) -> dict[str, Piece]:
    """The tensors that the file has, by their names in it. Raises UnsupportedModelError for one that the
    architecture is not known to have."""
    found = architecture(file)
    meta = Metadata(file, f"{found.name}.")
    layers = meta.whole("block_count", most=MOST_LAYERS)
    heads = meta.whole("attention.head_count")
    experts = _experts(meta, layers)
    known = pieces(
        found,
        layers=layers,
        heads=heads,
        kv_heads=meta.whole("attention.head_count_kv", heads),
        experts=experts,
    )
    strange = [name for name in file.tensors if name not in known and name not in FACTORS]
    if strange:
        raise UnsupportedModelError(
            f"{file.path}: {', '.join(map(repr, strange[:4]))} ({len(strange)} of {len(file.tensors)} "
            f"tensors) are not of the architecture {found.name} as it is known here, so the model would "
            "compute something else than it should; take the original model"
        )
    return {name: piece for name, piece in known.items() if name in file.tensors}


def model_config(file: Header) -> dict[str, Any]:
    """config.json. Keys that are not understood stand in it under their own names, for families to refuse.

    Raises CheckpointError for values that cannot be, UnsupportedModelError for what is not known here.
    """
    found = architecture(file)
    meta = Metadata(file, f"{found.name}.")
    table = file.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise CheckpointError(f"{file.path} has no matrix token_embd.weight: it is no whole model")
    common = {
        "architectures": [found.classes[0]],
        "model_type": found.model_type,
        "vocab_size": table.shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **_ends(file.metadata),
        **_dtype(file.tensors),
    }
    config = common | (_gpt2(meta) if found.name == "gpt2" else _decoder(file, found, meta))
    return config | meta.unread()


def query_scalar(config: Mapping[str, Any]) -> float:
    """query_pre_attn_scalar of Gemma, which GGUF does not hold: llama.cpp knows the two models, by their
    number of layers, whose heads are not their own measure."""
    odd = {"gemma2": 46, "gemma3_text": 62}[str(config["model_type"])]
    if config["num_hidden_layers"] == odd:
        return float(config["hidden_size"] / config["num_attention_heads"])
    return float(config["head_dim"])


def llama3_factors(
    factor: float, dim: int, theta: float, low: float = 1.0, high: float = 4.0, original: float = 8192
) -> npt.NDArray[np.float32]:
    """What llama3's rope_scaling divides frequencies by, as convert_hf_to_gguf.py writes it."""
    with np.errstate(all="ignore"):
        wavelength = 2 * np.pi * theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
        smooth = (original / wavelength - low) / (high - low)
        between = 1 / ((1 - smooth) / factor + smooth)
    chosen = np.where(wavelength < original / high, 1.0, between)
    return np.where(wavelength > original / low, factor, chosen).astype(np.float32)


def yarn_gain(factor: float) -> float:
    """YaRN's own factor of cos and sin (Peng et al. 2023)."""
    return 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0


def _decoder(file: Header, found: Architecture, meta: Metadata) -> dict[str, Any]:
    layers = meta.whole("block_count", most=MOST_LAYERS)
    hidden, heads = meta.whole("embedding_length"), meta.whole("attention.head_count")
    context = meta.whole("context_length")
    config: dict[str, Any] = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": meta.whole("attention.head_count_kv", heads),
        "head_dim": meta.whole("attention.key_length", max(hidden // heads, 1)),
        "intermediate_size": meta.whole("feed_forward_length"),
        "max_position_embeddings": context,
        "rms_norm_eps": meta.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": meta.number("rope.freq_base", 10000.0),
        "hidden_act": "silu",
    }
    turned = meta.whole("rope.dimension_count", config["head_dim"])
    if found.name == "phi3":
        config |= (
            {"partial_rotary_factor": turned / config["head_dim"]} if turned != config["head_dim"] else {}
        )
        config["original_max_position_embeddings"] = meta.whole(
            "rope.scaling.original_context_length", context
        )
    elif turned != config["head_dim"]:
        raise UnsupportedModelError(
            f"{file.path}: {found.name}.rope.dimension_count is {short(turned)}; {config['head_dim']}, the "
            "size of a head, is what is understood"
        )
    config["rope_scaling"] = _scaling(file, meta, config, turned)
    if f"{found.name}.attention.sliding_window" in file.metadata and meta.has("attention.sliding_window"):
        config["sliding_window"] = meta.whole("attention.sliding_window")
    elif found.name == "phi3":
        config["sliding_window"] = None
    return config | _own(file, found, meta, config)


def _own(file: Header, found: Architecture, meta: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    """What is an architecture's own."""
    has = file.tensors.__contains__
    match found.name:
        case "llama":
            experts = _experts(meta, config["num_hidden_layers"])
            own: dict[str, Any] = {}
            if experts:
                own = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
                own |= {"num_local_experts": experts, "num_experts_per_tok": meta.whole("expert_used_count")}
            elif "sliding_window" in config:
                own = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
            else:
                own = {
                    "attention_bias": has("blk.0.attn_q.bias"),
                    "mlp_bias": has("blk.0.ffn_up.bias"),
                }
            return own
        case "qwen3" | "qwen3moe":
            own = {"attention_bias": has("blk.0.attn_q.bias")}
            if found.name == "qwen3moe":
                own |= {
                    "num_experts": _experts(meta, config["num_hidden_layers"]),
                    "num_experts_per_tok": meta.whole("expert_used_count"),
                    "moe_intermediate_size": meta.whole("expert_feed_forward_length"),
                    "norm_topk_prob": True,  # llama.cpp always does
                }
            return own
        case "gemma2" | "gemma3":
            own = {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False}
            own["query_pre_attn_scalar"] = query_scalar(config | {"model_type": found.model_type})
            caps = {"attn_logit_softcapping": ("attn_logit_softcapping", 50.0)}
            caps |= {"final_logit_softcapping": ("final_logit_softcapping", 30.0)}
            for name, (key, default) in caps.items():
                if found.name == "gemma2" or meta.has(key):
                    own[name] = meta.number(key, default)
            if found.name == "gemma3":
                own["rope_local_base_freq"] = meta.number("rope.freq_base_swa", 10000.0)
                own["sliding_window_pattern"] = meta.whole("attention.sliding_window_pattern", 6)
            return own
        case _:
            return {}


def _gpt2(meta: Metadata) -> dict[str, Any]:
    heads = meta.whole("attention.head_count")
    if meta.whole("attention.head_count_kv", heads) != heads:
        raise UnsupportedModelError("a gpt2 whose heads share keys is not known")
    return {
        "n_embd": meta.whole("embedding_length"),
        "n_head": heads,
        "n_layer": meta.whole("block_count", most=MOST_LAYERS),
        "n_positions": meta.whole("context_length"),
        "n_inner": meta.whole("feed_forward_length"),
        "layer_norm_epsilon": meta.number("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
    }


def _experts(meta: Metadata, layers: int) -> int:
    return meta.whole("expert_count", most=MOST_EXPERTS // layers) if meta.has("expert_count") else 0


def _dtype(tensors: Mapping[str, GGUFTensor]) -> dict[str, str]:
    """torch_dtype: of most matrices that are floats, where there are any."""
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    kinds = Counter(t.block.name for t in tensors.values() if t.block.size == 1 and len(t.shape) > 1)
    return {"torch_dtype": names[kinds.most_common(1)[0][0]]} if kinds else {}


def _ends(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """bos_token_id and eos_token_id, the ends of a turn and of a message among the latter."""

    def token(name: str) -> int | None:
        value = metadata.get(f"tokenizer.ggml.{name}_token_id")
        return value if type(value) is int and 0 <= value < 2**31 else None

    ends = [t for t in dict.fromkeys(map(token, ("eos", "eot", "eom"))) if t is not None]
    begin = token("bos")
    return ({} if begin is None else {"bos_token_id": begin}) | (
        {"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else {}
    )


def _scaling(file: Header, meta: Metadata, config: Mapping[str, Any], dim: int) -> dict[str, Any] | None:
    """rope_scaling, from keys and from tensors of factors."""
    freqs, long, short_ = (_factors(file, name, dim) for name in FACTORS)
    original = "original_max_position_embeddings"
    if long is not None or short_ is not None:
        if long is None or short_ is None:
            raise CheckpointError(
                f"{file.path} has rope factors for short or long texts alone; both are needed"
            )
        made: dict[str, Any] = {"rope_type": "longrope", "short_factor": short_, "long_factor": long}
        meta.text("rope.scaling.type", "longrope")
        if meta.has("rope.scaling.attn_factor"):
            made["attention_factor"] = meta.number("rope.scaling.attn_factor")
        return made
    if freqs is not None:
        known = llama3_factors(max(freqs), dim, config["rope_theta"])
        if np.allclose(known, freqs, rtol=1e-6, atol=0):
            return {"rope_type": "llama3", "factor": max(freqs), **LLAMA3}
        # The same factor for every length: what longrope does when both of its lists are one.
        return {"rope_type": "longrope", "short_factor": freqs, "long_factor": freqs, "attention_factor": 1.0}
    kind = meta.text("rope.scaling.type", "none")
    if not meta.has("rope.scaling.type") and meta.has("rope.scale_linear"):
        return {"rope_type": "linear", "factor": meta.number("rope.scale_linear")}
    match kind:
        case "none" | "longrope":  # Phi's short models say longrope and have no factors
            if meta.has("rope.scaling.attn_factor"):
                meta.number("rope.scaling.attn_factor")
            return None
        case "linear":
            return {"rope_type": "linear", "factor": meta.number("rope.scaling.factor")}
        case "yarn":
            made = {"rope_type": "yarn", "factor": meta.number("rope.scaling.factor")}
            made[original] = meta.whole("rope.scaling.original_context_length")
            if meta.has("rope.scaling.attn_factor"):  # llama.cpp's comes on top of YaRN's own
                made["attention_factor"] = meta.number("rope.scaling.attn_factor") * yarn_gain(made["factor"])
            return made | {
                f"beta_{end}": meta.number(f"rope.scaling.yarn_beta_{end}")
                for end in ("fast", "slow")
                if meta.has(f"rope.scaling.yarn_beta_{end}")
            }
    raise UnsupportedModelError(
        f"{file.path}: rope.scaling.type is {short(kind)}; none, linear, yarn and longrope are understood"
    )


def _factors(file: Header, name: str, dim: int) -> list[float] | None:
    tensor = file.tensors.get(name)
    if tensor is None:
        return None
    if tensor.block.name != "F32" or tensor.shape != (dim // 2,):
        raise CheckpointError(
            f"{file.path}: {name} is {tensor.block.name} {tensor.shape}; F32 ({dim // 2},) is right"
        )
    values = np.frombuffer(file.map, "<f4", dim // 2, tensor.start)
    return [float(str(value)) for value in values]
