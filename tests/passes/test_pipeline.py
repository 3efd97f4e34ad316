"""Passes: which run, in which order, and what they do to a graph's weights."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gossamer.config import EngineConfig, MixedPrecision, Quantization
from gossamer.config.quantization import GROUPS
from gossamer.errors import ConfigError
from gossamer.graph.families import build_graph
from gossamer.passes import pipeline
from gossamer.passes.base import Pass
from gossamer.passes.pipeline import run_passes
from gossamer.passes.quantization import auto_group

CONFIG = {
    "architectures": ["MixtralForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 128,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": None,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}


def unfused(**options: object) -> EngineConfig:
    plain = {"operator_fusion": None, "layer_fusion": None, "sparse_weights": None}
    return EngineConfig(model="m", **(plain | options))  # type: ignore[arg-type]


def test_nothing_asked_nothing_changed() -> None:
    graph = build_graph(CONFIG)
    after, ran = run_passes(graph, unfused())
    assert ran == []
    assert after == graph


@pytest.mark.parametrize(
    ("text", "format", "group"),
    [
        ("int8", "int8", 0),
        ("int8-g16", "int8", 16),
        ("int4", "int4", 32),
        ("int4-g64", "int4", 64),
        ("uint4", "uint4", 32),
        ("uint4-g128", "uint4", 128),
        ("nf4", "nf4", 32),
        ("nf4-g64", "nf4", 64),
    ],
)
def test_quantization_takes_every_matrix_but_the_routers(text: str, format: str, group: int) -> None:
    config = unfused(quantization=Quantization.parse(text))
    graph, ran = run_passes(build_graph(CONFIG), config)
    assert ran == ["quantization"]
    for name, weight in graph.weights.items():
        wide = len(weight.shape) > 1 and "router" not in name
        assert (weight.format, weight.group) == ((format, group) if wide else ("f32", 0)), name


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_mixed_precision_keeps_norms_in_fp32(dtype: str) -> None:
    config = unfused(mixed_precision=MixedPrecision(dtype=dtype))  # type: ignore[arg-type]
    graph, ran = run_passes(build_graph(CONFIG), config)
    assert ran == ["mixed_precision"]
    assert {w.format for w in graph.weights.values() if len(w.shape) == 1} == {"f32"}
    assert graph.weights["embedding"].format == dtype


def test_unknown_pass_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="mixed_precision"):
        run_passes(build_graph(CONFIG), EngineConfig(model="m"), until="fusion")


def test_order_follows_after_and_before(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(name: str, **order: tuple[str, ...]) -> Pass:
        return Pass(name=name, wanted=lambda config: True, run=lambda graph, config: graph, **order)

    chain = (make("c", after=("b",)), make("b"), make("a", before=("b",)))
    monkeypatch.setattr(pipeline, "PASSES", chain)
    assert run_passes(build_graph(CONFIG), EngineConfig(model="m"))[1] == ["a", "b", "c"]
    monkeypatch.setattr(pipeline, "PASSES", (make("a", after=("b",)), make("b", after=("a",))))
    with pytest.raises(ConfigError, match="wait for each other"):
        run_passes(build_graph(CONFIG), EngineConfig(model="m"))


def test_a_broken_pass_is_caught_by_the_verifier(monkeypatch: pytest.MonkeyPatch) -> None:
    from gossamer.errors import GraphError

    broken = Pass(
        name="broken",
        wanted=lambda config: True,
        run=lambda graph, config: replace(graph, nodes=graph.nodes[:-1]),
    )
    monkeypatch.setattr(pipeline, "PASSES", (broken,))
    with pytest.raises(GraphError):
        run_passes(build_graph(CONFIG), EngineConfig(model="m"))


@pytest.mark.parametrize(("format", "group"), [("int8", 0), ("int4", 128), ("uint4", 128), ("nf4", 64)])
def test_the_group_that_suits_a_model_of_even_sizes(format: str, group: int) -> None:
    assert auto_group(build_graph({**CONFIG, "hidden_size": 128, "intermediate_size": 256}), format) == group


@pytest.mark.parametrize("format", GROUPS)
def test_every_spelling_is_read_as_it_is_written(format: str) -> None:
    for text in (format, *(f"{format}-g{group}" for group in GROUPS[format])):
        assert str(Quantization.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    ["int3", "int4-g", "int4-g48", "int8-g64", "int8-g0", "uint4-g16", "nf4-g256", "uint8", "INT4", ""],
)
def test_unknown_quantizations_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        Quantization.parse(text)


def test_contradictions_name_both_sides() -> None:
    with pytest.raises(ConfigError, match=r"without --dtype, or without --quantization"):
        EngineConfig(model="m", quantization=Quantization(format="int8"), mixed_precision=MixedPrecision())
