"""Reading the fields that Llama-like families spell alike."""

from __future__ import annotations

from dataclasses import dataclass

from gossamer.errors import UnsupportedModelError
from gossamer.graph.families.fields import Fields
from gossamer.graph.families.rotary import Rotary, rotary

__all__ = ["MOST_EXPERTS", "Sizes", "read_layer_windows", "read_rotary", "read_sizes", "split_heads"]

# Beyond these a config.json is damaged or hostile, and its graph would fill the memory.
MOST_LAYERS = 1000
MOST_EXPERTS = 100_000  # of all layers together
_LAYER_TYPES = {"full_attention": False, "sliding_attention": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Extents of a decoder and what all its layers share."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    eps: float
    act: str
    max_positions: int
    tied: bool


def read_sizes(
    f: Fields,
    *,
    max_positions: int,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    eps: float = 1e-6,
    tied: bool = False,
    act_field: str = "hidden_act",
    act: str = "silu",
) -> Sizes:
    """Sizes under transformers' names. The arguments are the family's defaults of absent fields;
    kv_heads None: as many as heads; head_dim None: hidden / heads. Raises UnsupportedModelError."""
    hidden, heads = f.size("hidden_size"), f.size("num_attention_heads")
    shared = f.optional_size("num_key_value_heads", kv_heads) or heads
    size = f.optional_size("head_dim", head_dim) or split_heads(hidden, heads)
    if heads % shared:
        raise UnsupportedModelError(
            f"config.json: num_key_value_heads is {shared}; a divisor of the {heads} attention heads is right"
        )
    return Sizes(
        layers=f.size("num_hidden_layers", most=MOST_LAYERS),
        hidden=hidden,
        heads=heads,
        kv_heads=shared,
        head_dim=size,
        ffn=f.size("intermediate_size"),
        vocab=f.size("vocab_size"),
        eps=f.number("rms_norm_eps", eps),
        act=f.activation(act_field, act),
        max_positions=f.size("max_position_embeddings", max_positions),
        tied=f.flag("tie_word_embeddings", tied),
    )


def split_heads(hidden: int, heads: int) -> int:
    """The head size of models that do not state one. Raises UnsupportedModelError."""
    if hidden % heads:
        raise UnsupportedModelError(
            f"config.json: hidden size {hidden} is not a multiple of {heads} heads, and head_dim is not given"
        )
    return hidden // heads


def read_rotary(
    f: Fields,
    sizes: Sizes,
    context: int | None,
    *,
    theta: float = 10000.0,
    partial: bool = False,
    original: int | None = None,
) -> Rotary:
    """Frequencies from rope_theta and rope_scaling. theta, original: the family's defaults of rope_theta
    and original_max_position_embeddings; partial: whether it knows partial_rotary_factor (the share of
    each head that rotates). Raises UnsupportedModelError."""
    share = f.number("partial_rotary_factor", 1.0) if partial else 1.0
    if not partial:
        f.only("partial_rotary_factor", 1.0)
    scaling = f.raw("rope_scaling")
    if scaling is not None and not isinstance(scaling, dict):
        raise UnsupportedModelError(f"config.json: rope_scaling is {scaling!r}; an object or null is right")
    if scaling and scaling.get("rope_type", scaling.get("type")) in ("longrope", "su"):
        original = f.optional_size("original_max_position_embeddings", original)
    return rotary(
        dim=int(sizes.head_dim * share),
        theta=f.number("rope_theta", theta),
        scaling=scaling,
        max_positions=sizes.max_positions,
        context=context,
        original=original,
    )


def read_layer_windows(
    f: Fields, layers: int, window: int | None, slides: list[bool]
) -> tuple[int | None, ...]:
    """Per layer its attention window or None, from layer_types; slides: which layers have the window
    where that field is absent. Raises UnsupportedModelError."""
    types = f.raw("layer_types")
    if types is not None:
        if (
            not isinstance(types, list)
            or len(types) != layers
            or any(t not in list(_LAYER_TYPES) for t in types)
        ):
            raise UnsupportedModelError(
                f"config.json: layer_types is {types!r}; {layers} times {' or '.join(_LAYER_TYPES)} is right"
            )
        slides = [_LAYER_TYPES[t] for t in types]
    return tuple(window if slide else None for slide in slides)
