"""Activations with a calibrated scale: the integers of the specification on every instruction set, whatever
fuses, and the reference's numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer import _native
from gossamer.config import EngineConfig, OperatorFusion, Quantization
from gossamer.errors import GraphError
from gossamer.graph.ir import Graph
from gossamer.graph.ops.formats import round_activations, round_weight
from gossamer.graph.verify import verify
from gossamer.passes.pipeline import run_passes
from tests.numerics.harness import ISAS, OpGraph, make_cpu, run_cpu, run_reference
from tests.numerics.test_cpu_ops import close, random
from tests.passes.test_fusion import Model, logits, plain


def scaled(graph: Graph, scales: dict[str, float]) -> Graph:
    changed = {n: replace(graph.weights[n], activation_scale=s) for n, s in scales.items()}
    return replace(graph, weights={**graph.weights, **changed})


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=20, deadline=None)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 50),
    k=st.integers(1, 300),
    scale=st.sampled_from([1e-6, 0.003, 0.0213, 0.5, 1e6]),
    seed=st.integers(0, 9),
)
def test_linear_is_the_specification(isa: str, m: int, n: int, k: int, scale: float, seed: int) -> None:
    """Also where all is clamped and where all rounds to zero; row by row the same bits."""
    g = OpGraph()
    x, w = random(m, k, seed=seed), random(n, k, seed=seed + 10)
    x[0, 0] = 63.5 * np.float32(scale)  # halfway: to the even integer
    y = g.builder.linear(g.input("x", x), g.weight("w", w))
    graph = scaled(g.finish(y, formats={"w": ("int8", 0)}), {"w": scale})
    seen = round_activations(torch.from_numpy(x), "int8", 0, scale)
    assert float((seen / np.float32(scale)).round().abs().max()) <= 127
    want = (seen.double() @ round_weight(torch.from_numpy(w), "int8").double().T).float().numpy()
    got = run_cpu(graph, g.arrays, m, isa=isa)
    assert np.abs(got - want).max() <= 3e-6 * np.abs(want).max()
    assert np.array_equal(run_cpu(graph, g.arrays, 1, isa=isa), got[:1])
    close(got / np.float32(scale), run_reference(graph, g.arrays, m) / np.float32(scale), 1e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_not_lost_in_a_clamp(isa: str, bad: float) -> None:
    g = OpGraph()
    w = random(20, 40, seed=1)
    graph = scaled(
        g.finish(
            g.builder.linear(
                g.builder.op("add", g.input("x", random(3, 40)), g.input("z", np.zeros((3, 40))), out="sum"),
                g.weight("w", w),
            ),
            formats={"w": ("int8", 0)},
        ),
        {"w": 0.02},
    )
    g.arrays["z"][1, 7] = bad
    got, want = run_cpu(graph, g.arrays, 3, isa=isa), run_reference(graph, g.arrays, 3)
    assert np.isnan(got[1]).all() and np.isnan(want[1]).all()
    close(got[[0, 2]], want[[0, 2]])


def calibrated(family: str, differing: bool = False) -> Model:
    """A family in int8 with a scale for every linear layer, those of one input alike (or not)."""
    model = plain(family)
    config = EngineConfig(
        model="m", quantization=Quantization(format="int8"), operator_fusion=None, layer_fusion=None
    )
    graph = run_passes(model.graph, config)[0]
    scales = {}
    for node in graph.nodes:
        if node.op == "linear" and node.scope:
            where = sum(map(ord, node.inputs[0])) % 7
            scales[node.weights[0]] = 0.004 * (where + 3) + (1e-3 * len(scales) if differing else 0.0)
    return replace(model, graph=scaled(graph, scales))


def fused(model: Model) -> Model:
    config = EngineConfig(model="m", operator_fusion=OperatorFusion())
    return replace(model, graph=run_passes(model.graph, config)[0])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_fused_and_unfused_agree_in_every_bit(isa: str, family: str) -> None:
    model = calibrated(family)
    whole = fused(model)
    ops = {node.op for node in whole.graph.nodes}
    assert {"rms_norm_quantize", "layer_norm_quantize"} & ops and "merged_linear" in ops
    norms = [n for n in whole.graph.nodes if n.op.endswith("_quantize")]
    assert any(n.attrs["scale"] > 0 for n in norms)
    want = logits(model, (5, 19), isa=isa)
    assert np.array_equal(logits(whole, (5, 19), isa=isa), want)
    dynamic = replace(model, graph=scaled(model.graph, dict.fromkeys(scaled_weights(model.graph), 0.0)))
    assert not np.array_equal(logits(dynamic, (5, 19), isa=isa), want)  # the scales do something


def scaled_weights(graph: Graph) -> list[str]:
    return [name for name, weight in graph.weights.items() if weight.activation_scale]


def test_layers_that_scale_one_input_differently_stay_apart() -> None:
    model = calibrated("llama", differing=True)
    whole = fused(model)
    ops = {node.op for node in whole.graph.nodes}
    assert "merged_linear" not in ops and "gated_linear" not in ops
    assert not any(n.op == "rms_norm_quantize" and n.scope for n in whole.graph.nodes)
    assert np.array_equal(logits(whole, (5, 19)), logits(model, (5, 19)))


def test_the_verifier_refuses_scales_where_they_mean_nothing() -> None:
    g = OpGraph()
    y = g.builder.linear(g.input("x", random(2, 32)), g.weight("w", random(16, 32)))
    for format, scale in ((("int4", 32), 0.1), (("int8", 16), 0.1), (("int8", 0), -1.0)):
        graph = scaled(g.finish(y, formats={"w": format}), {"w": scale})
        with pytest.raises(GraphError, match=r"'w'.*only int8 without groups takes one"):
            verify(graph)
        with pytest.raises(ValueError, match="only activations of int8"):
            make_cpu(graph, g.arrays, 2, isa=str(_native.best_isa()))


def test_another_format_leaves_the_scale_behind() -> None:
    model = calibrated("llama")
    again = run_passes(model.graph, EngineConfig(model="m", quantization=Quantization(format="int4")))[0]
    assert not scaled_weights(again)
    kept = run_passes(model.graph, EngineConfig(model="m", quantization=Quantization(format="int8")))[0]
    assert scaled_weights(kept) == scaled_weights(model.graph)
