"""Operator fusion by declarative rules. Every rule keeps the numbers: the fused op does the same
arithmetic in the same order, so logits are bit-identical with and without it.

What each saves: qkv_merge and gate_up_merge read the activations once and wake the threads once;
epilogues finish an output tile while it is in cache; norm_quantize never stores the normed row.
"""

from __future__ import annotations

from collections.abc import Mapping

from gossamer.config import EngineConfig
from gossamer.graph.ir import Graph
from gossamer.graph.ops.fused import LINEAR_OPS, PREPARED_FORMATS, matrix_weights
from gossamer.passes.base import Pass
from gossamer.passes.rewrite import Match, Rule, Sketch, rewrite

__all__ = ["PASS", "RULES", "operator_fusion"]

Sketches = Mapping[str, Sketch] | None


def _side_by_side(match: Match, *names: str) -> tuple[str, ...] | None:
    """Weights, then biases, of linear nodes that can run as one; None where formats, biases or the scales
    of activations differ."""
    nodes = [match.nodes[name] for name in names]
    if len({len(node.weights) for node in nodes}) > 1:
        return None
    if len({(match.weight(name).reads, match.weight(name).sparse) for name in names}) > 1:
        return None
    return tuple(node.weights[i] for i in range(len(nodes[0].weights)) for node in nodes)


def _qkv(match: Match) -> Sketches:
    weights = _side_by_side(match, "q", "k", "v")
    turned, attention = match.nodes.get("qr"), match.nodes["h"]
    if weights is None:
        return None
    attrs = {"magnitude": None, "eps": None}
    constants: tuple[str, ...] = ()
    if turned is not None:
        other = match.nodes["kr"]
        if (turned.weights, turned.attrs) != (other.weights, other.attrs):
            return None
        attrs["magnitude"] = turned.attrs["magnitude"]
        constants += turned.weights
    if "qn" in match.nodes:
        norms = match.nodes["qn"], match.nodes["kn"]
        if norms[0].attrs != norms[1].attrs:
            return None
        attrs["eps"] = norms[0].attrs["eps"]
        constants += norms[0].weights + norms[1].weights
    size = attention.attrs["head_dim"]
    keys = match.graph.values[match.values["k"]].shape[1]
    assert isinstance(keys, int)
    layer = match.nodes["kv"].attrs["layer"]
    return {
        "qkv": Sketch(weights, {"parts": 3}),
        match_first(match, "qr", "q"): Sketch(
            constants,
            {
                "layer": layer,
                "heads": attention.attrs["heads"],
                "kv_heads": keys // size,
                "head_dim": size,
                **attrs,
            },
        ),
    }


def match_first(match: Match, *names: str) -> str:
    """The first of these pattern names that the match has."""
    return next(name for name in names if name in match.nodes)


def _gate_up(match: Match) -> Sketches:
    weights = _side_by_side(match, "g", "u")
    return None if weights is None else {"y": Sketch(weights, match.nodes["y"].attrs)}


def _activation(match: Match) -> Sketches:
    return {"y": Sketch(match.nodes["h"].weights, match.nodes["y"].attrs)}


def _residual(match: Match) -> Sketches:
    # Both ways round are patterns of their own; a float sum does not depend on the order.
    return {"y": Sketch(match.nodes["h"].weights)}


def _norm_residual(match: Match) -> Sketches:
    norm = match.nodes["n"]
    whole = match.weight("n").shape[0] == match.graph.values[match.values["x"]].shape[1]
    return {"y": Sketch(norm.weights, norm.attrs)} if whole else None


def _norm_quantize(match: Match) -> Sketches:
    norm = match.nodes["n"]
    readers = match.readers.get(match.values["n"], ())
    if match.values["n"] in match.graph.outputs.values() or not readers:
        return None
    if any(node.op not in LINEAR_OPS or node.inputs[0] != match.values["n"] for node in readers):
        return None
    if any(value == match.values["n"] for node in readers for value in node.inputs[1:]):
        return None
    read_as = {match.graph.weights[w].reads for node in readers for w in matrix_weights(node)}
    (format, group, scale), *others = read_as
    whole = match.weight("n").shape[0] == match.graph.values[match.values["x"]].shape[1]
    if others or format not in PREPARED_FORMATS or not whole:
        return None
    return {"n": Sketch(norm.weights, {**norm.attrs, "format": format, "group": group, "scale": scale})}


_QKV_TAIL = """
    kv = kv_write({k}, v)
    h = attention({q}, kv)
    ->
    qkv = merged_linear(x)
    {q}, kv = qkv_write(qkv, {positions})
    h = attention({q}, kv)
"""
_QKV_HEAD = """
    q = linear(x)
    k = linear(x)
    v = linear(x)
"""
_NORMED = """
    qn = rms_norm(q)
    kn = rms_norm(k)
"""
_TURNED = """
    qr = rope({q}, positions)
    kr = rope({k}, positions)
"""

RULES: tuple[Rule, ...] = (
    Rule(
        "qkv_merge",
        _QKV_HEAD
        + _NORMED
        + _TURNED.format(q="qn", k="kn")
        + _QKV_TAIL.format(q="qr", k="kr", positions="positions"),
        _qkv,
    ),
    Rule(
        "qkv_merge",
        _QKV_HEAD + _TURNED.format(q="q", k="k") + _QKV_TAIL.format(q="qr", k="kr", positions="positions"),
        _qkv,
    ),
    Rule("qkv_merge", _QKV_HEAD + _QKV_TAIL.format(q="q", k="k", positions="positions"), _qkv),
    Rule(
        "gate_up_merge",
        """
        g = linear(x)
        u = linear(x)
        y = act_mul(g, u)
        ->
        y = gated_linear(x)
        """,
        _gate_up,
    ),
    Rule(
        "activation_epilogue",
        """
        h = linear(x)
        y = activation(h)
        ->
        y = linear_act(x)
        """,
        _activation,
    ),
    *(
        Rule(
            "residual_epilogue",
            f"""
            h = linear(x)
            y = add({inputs})
            ->
            y = linear_add(x, r)
            """,
            _residual,
        )
        for inputs in ("r, h", "h, r")
    ),
    *(
        Rule(
            "norm_residual",
            f"""
            n = rms_norm(x)
            y = add({inputs})
            ->
            y = rms_norm_add(x, r)
            """,
            _norm_residual,
        )
        for inputs in ("r, n", "n, r")
    ),
    *(
        Rule(
            "norm_quantize",
            f"""
            n = {norm}(x)
            ->
            n = {norm}_quantize(x)
            """,
            _norm_quantize,
        )
        for norm in ("rms_norm", "layer_norm")
    ),
)


def operator_fusion(graph: Graph, config: EngineConfig) -> Graph:
    """Replaces groups of ops by fused ones, rule by rule (QKV and gate/up merge, epilogues, norms)."""
    assert config.operator_fusion is not None
    for rule in RULES:
        if rule.name not in config.operator_fusion.without:
            graph, _ = rewrite(graph, rule)
    return graph


PASS = Pass(
    name="operator_fusion",
    wanted=lambda config: config.operator_fusion is not None,
    run=operator_fusion,
    after=("mixed_precision", "quantization"),
)
