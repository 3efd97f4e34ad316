"""The format plan: which rule decides which matrix, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from gossamer.config import EngineConfig, MixedPrecision, Quantization
from gossamer.errors import ConfigError
from gossamer.graph.families import build_graph
from gossamer.passes.pipeline import run_passes
from gossamer.passes.weight_formats import plan_formats
from tests.passes.test_pipeline import CONFIG

DENSE = {k: v for k, v in CONFIG.items() if "experts" not in k} | {
    "architectures": ["LlamaForCausalLM"],
    "tie_word_embeddings": True,
}


def plan(raw: dict[str, Any], formats: dict[str, str], **options: Any) -> dict[str, tuple[str, int, str]]:
    """weight -> format, group, rule; after a check that the passes store exactly that."""
    config = EngineConfig(model="m", weight_formats=tuple(formats.items()), **options)
    graph = build_graph(raw)
    choices = {c.weight: c for c in plan_formats(graph, config)}
    after, _ = run_passes(graph, config)
    for name, weight in after.weights.items():
        wanted = (choices[name].format, choices[name].group) if name in choices else ("f32", 0)
        assert (weight.format, weight.group) == wanted, name
    assert set(choices) == {name for name, w in graph.weights.items() if len(w.shape) > 1}
    return {name: (c.format, c.group, c.rule) for name, c in choices.items()}


@pytest.mark.parametrize(
    ("text", "stored"),
    [
        ("f32", ("f32", 0)),
        ("fp16", ("f16", 0)),
        ("bfloat16", ("bf16", 0)),
        ("int8", ("int8", 0)),
        ("int4", ("int4", 64)),  # 64 divides all inputs of the matched, though not 96, those of others
        ("int4-g32", ("int4", 32)),
    ],
)
def test_a_pattern_wins_over_quantization(text: str, stored: tuple[str, int]) -> None:
    found = plan(DENSE, {"layers.*.attention.?_proj": text}, quantization=Quantization(format="int4"))
    for name, (format, group, rule) in found.items():
        if "attention" in name and "out" not in name:
            assert (format, group, rule) == (*stored, f"pattern layers.*.attention.?_proj={text}")
        else:
            assert (format, group, rule) == ("int4", 32, "quantization int4")


def test_routers_stay_and_the_rest_is_mixed_precision() -> None:
    found = plan(CONFIG, {"layers.1.mlp.*": "int8"}, mixed_precision=MixedPrecision())
    assert found["layers.0.mlp.router"] == found["layers.1.mlp.router"] == ("f32", 0, "routers stay f32")
    assert found["layers.1.mlp.gate_experts"][0] == "int8"
    assert found["layers.0.mlp.gate_experts"] == ("bf16", 0, "mixed precision bf16")


def test_patterns_alone_leave_the_rest_in_f32() -> None:
    found = plan(DENSE, {"layers.0.*": "int8", "layers.*.mlp.down": "f16"})  # the second by node name
    assert found["layers.0.mlp.down_proj"][0] == "int8"
    assert found["layers.1.mlp.down_proj"] == ("f16", 0, "pattern layers.*.mlp.down=f16")
    assert found["embedding"] == ("f32", 0, "f32")


def test_a_tied_embedding_is_one_weight_also_named_head() -> None:
    for name in ("head", "embedding", "logits"):
        assert plan(DENSE, {name: "int8"})["embedding"][0] == "int8"
    with pytest.raises(ConfigError, match=r"'head' decides nothing: embedding is int8 already"):
        plan(DENSE, {"embedding": "int8", "head": "bf16"})
    untied = plan(DENSE | {"tie_word_embeddings": False}, {"embedding": "int8", "head": "bf16"})
    assert (untied["embedding"][0], untied["head"][0]) == ("int8", "bf16")


@pytest.mark.parametrize(
    ("formats", "said"),
    [
        (
            {"layers.*.mlp.dwn_proj": "int8"},
            r"no matrix .* did you mean layers\.\*\.mlp\.down_experts",
        ),
        ({"layers.7.mlp.down_experts": "int8"}, "matches no matrix"),
        ({"final_norm_weight": "bf16"}, "matches no matrix"),
        ({"layers.0.mlp.norm_weight": "bf16"}, "is a vector"),
        ({"*router": "bf16"}, "routers stay f32"),
        ({"*.gate_experts": "int8"}, "must have one format"),
        ({"embedding": "int5"}, "int5"),
        ({"": "int8"}, "weight_formats is"),
    ],
)
def test_what_is_refused(formats: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        plan(CONFIG, formats)
