"""Formats of quantized checkpoints by config.json alone."""

from __future__ import annotations

from typing import Any

import pytest

from gossamer.checkpoint.declared import as_declared
from gossamer.errors import UnsupportedModelError
from tests.graph.small import llama

GRAPH = llama(hidden_size=128, intermediate_size=256, num_attention_heads=4)


@pytest.mark.parametrize(
    "settings,stored",
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, ("int4", 128)),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}, ("uint4", 32)),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, ("int8", 0)),
        ({"quant_method": "awq", "group_size": 64}, ("uint4", 64)),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ("nf4", 64)),
        ({"load_in_8bit": True}, ("int8", 0)),
    ],
    ids=str,
)
def test_methods(settings: dict[str, Any], stored: tuple[str, int]) -> None:
    graph = as_declared(GRAPH, settings)
    for node in graph.nodes:
        for name in node.weights:
            weight = graph.weights[name]
            inside = bool(node.scope) and len(weight.shape) > 1
            assert (weight.format, weight.group) == (stored if inside else ("f32", 0)), name


def test_what_stays_floats() -> None:
    weights = {"num_bits": 8, "strategy": "channel", "symmetric": True}
    settings = {
        "quant_method": "compressed-tensors", "ignore": ["lm_head", "re:.*down_proj.*"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }  # fmt: skip
    formats = {name: w.format for name, w in as_declared(GRAPH, settings).weights.items() if len(w.shape) > 1}
    assert {formats[name] for name in formats if "down" in name} == {"f32"}
    assert {formats[name] for name in formats if "up" in name or "query" in name} == {"int8"}


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "hqq"},
        {"quant_method": "compressed-tensors", "config_groups": {"a": {}, "b": {}}},
        {"quant_method": "gptq", "bits": "four"},
        {"quant_method": "gptq", "bits": 3},
    ],
    ids=str,
)
def test_what_says_too_little(settings: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError):
        as_declared(GRAPH, settings)
