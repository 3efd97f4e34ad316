"""The shape of a model with parts removed: how many of each stay, and the config.json that says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gossamer.compress.prune.axes import layer_of, weight_kinds
from gossamer.config.compression import Structured
from gossamer.errors import ConfigError, UnsupportedModelError
from gossamer.graph.ir import Graph
from gossamer.graph.weights import Constant

__all__ = ["Counts", "check_alike", "counts_left", "counts_of", "smaller_config"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """ffn: channels of plain MLPs and of experts, 0 where there are none."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    expert_ffn: int


def counts_of(graph: Graph) -> Counts:
    """Of a graph. Raises UnsupportedModelError where layers differ among themselves."""
    heads = {(n.attrs["heads"], n.attrs["head_dim"]) for n in graph.nodes if n.op == "attention"}
    shared = {group.kv_heads for group in graph.kv_groups}
    found: dict[bool, set[int]] = {False: set(), True: set()}
    for name, kinds in weight_kinds(graph).items():
        if kinds[-1:] == ("ffn",):
            found[len(kinds) == 3].add(graph.weights[name].shape[-1])
    if len(heads) != 1 or len(shared) != 1 or any(len(widths) > 1 for widths in found.values()):
        raise UnsupportedModelError(
            "the layers of this model differ in heads or widths, and structured pruning is uniform; "
            "prune single weights instead (magnitude, wanda, sparsegpt)"
        )
    (count, size), (kv,) = next(iter(heads)), shared
    return Counts(
        layers=graph.layers,
        hidden=graph.hidden,
        heads=count,
        kv_heads=kv,
        head_dim=size,
        ffn=max(found[False], default=0),
        expert_ffn=max(found[True], default=0),
    )


def counts_left(config: Structured, counts: Counts) -> Counts:
    """What stays. Raises ConfigError for a share that leaves nothing, or takes nothing."""
    kv = _left("heads", config.heads, counts.kv_heads, 1)
    return Counts(
        layers=_left("layers", config.layers, counts.layers, 1),
        hidden=_left("hidden", config.hidden, counts.hidden, config.hidden_multiple),
        heads=kv * (counts.heads // counts.kv_heads),
        kv_heads=kv,
        head_dim=counts.head_dim,
        ffn=_left("ffn", config.ffn, counts.ffn, config.ffn_multiple),
        expert_ffn=_left("ffn", config.ffn, counts.expert_ffn, config.ffn_multiple),
    )


def _left(name: str, share: float, count: int, multiple: int) -> int:
    if not share or not count:
        return count
    left = round((1 - share) * count / multiple) * multiple
    if 0 < left < count:
        return left
    steps = f", in steps of {multiple} (prune.{name}_multiple)" if multiple > 1 else ""
    what = "key-value heads" if name == "heads" else {"ffn": "channels", "hidden": "columns"}.get(name, name)
    raise ConfigError(
        f"prune.{name} {share:g} of {count} {what}{steps} leaves {left}; "
        + ("one at least must stay" if left <= 0 else "a larger share takes one")
        + (f" (try {multiple / count:.3g} or more)" if left >= count and multiple < count else "")
    )


def smaller_config(
    config: Mapping[str, Any], graph: Graph, left: Counts, layers: Sequence[int]
) -> dict[str, Any]:
    """config.json of the model of these counts. layers: the old ones that stay, in order.

    Raises UnsupportedModelError where the architecture ties one part's size to another's.
    """
    old = counts_of(graph)
    if "n_embd" in config:
        if (left.hidden, left.heads) != (old.hidden, old.heads):
            raise UnsupportedModelError(
                f"{config['architectures'][0]} has heads of n_embd / n_head columns and no config.json says "
                "otherwise, so neither heads nor hidden can be fewer; prune ffn and layers"
            )
        return {**config, "n_layer": left.layers, "n_inner": left.ffn}
    new = dict(config) | {"num_hidden_layers": left.layers, "hidden_size": left.hidden}
    if (left.hidden, left.heads) != (old.hidden, old.heads) or "head_dim" in config:
        new |= {"head_dim": old.head_dim}
    new |= {"num_attention_heads": left.heads, "num_key_value_heads": left.kv_heads}
    if old.ffn != left.ffn:
        new |= {"intermediate_size": left.ffn}
    if old.expert_ffn != left.expert_ffn:
        field = "moe_intermediate_size" if "moe_intermediate_size" in config else "intermediate_size"
        new |= {field: left.expert_ffn}
    if len(layers) != old.layers:
        _pick_layers(new, graph, layers)
    return new


def _pick_layers(new: dict[str, Any], graph: Graph, layers: Sequence[int]) -> None:
    """What config.json says by the layer's number is said for those that stay."""
    window = {n.attrs["layer"]: n.attrs["window"] for n in graph.nodes if n.op == "attention"}
    if new.get("layer_types") is not None or len(set(window.values())) > 1:
        sliding = [window[layer] is not None for layer in layers]
        new["layer_types"] = ["sliding_attention" if slides else "full_attention" for slides in sliding]
    if "decoder_sparse_step" in new or "mlp_only_layers" in new:
        routed = {layer_of(n.scope) for n in graph.nodes if n.op == "experts"}
        new["decoder_sparse_step"] = 1
        new["mlp_only_layers"] = [i for i, layer in enumerate(layers) if layer not in routed]


def check_alike(old: Graph, new: Graph, layers: Sequence[int]) -> None:
    """Raises UnsupportedModelError where a layer that stays would compute something else in its new place."""
    for at, layer in enumerate(layers):
        pairs = zip(_of_layer(old, layer), _of_layer(new, at), strict=True)
        for before, after in pairs:
            if _meaning(old, before) != _meaning(new, after):
                raise UnsupportedModelError(
                    f"layer {layer} would compute something else as layer {at} ({before.op}): this "
                    "architecture goes by the layer's number; leave all layers, prune other parts"
                )


def _of_layer(graph: Graph, layer: int) -> list[Any]:
    return [node for node in graph.nodes if layer_of(node.scope) == layer]


def _meaning(graph: Graph, node: Any) -> tuple[Any, ...]:
    attrs = {key: value for key, value in node.attrs.items() if key not in ("layer", "heads")}
    constants = [w.expr for name in node.weights if isinstance((w := graph.weights[name]).expr, Constant)]
    return node.op, attrs, constants
