"""Structured pruning: what does nothing goes without a trace, in every family; others load what is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from gossamer.backends.reference import ReferenceModel
from gossamer.compress.prune.axes import layer_of, weight_kinds
from gossamer.compress.prune.structured import run
from gossamer.config.compression import Structured
from gossamer.errors import ConfigError, UnsupportedModelError
from tests.families.configs import CASES

from .small import TEXT, interrupted, job, logits, save

SMALL = {"ffn_multiple": 4, "hidden_multiple": 8}
PARTS: dict[str, dict[str, Any]] = {
    "heads": {"heads": 0.5},
    "ffn": {"ffn": 0.2},
    "hidden": {"hidden": 0.34},
    "layers": {"layers": 0.3},
    "all": {"heads": 0.5, "ffn": 0.2, "hidden": 0.34, "layers": 0.3},
}
FAMILIES = [
    "llama-tied-head_dim-biases", "mistral-window", "qwen2-layer-types", "qwen3", "gemma2", "gemma3", "phi3",
    "mixtral", "qwen3_moe",
]  # fmt: skip
NORM_EPS = {"rms_norm_eps": 1e-9}  # it is not rescaled with the norms


def useless(parts: dict[str, Any]) -> Any:
    """Makes as many heads, channels, columns and layers do nothing as `parts` takes."""
    gone = {
        "heads": lambda size: np.arange(size // 2),  # the first of two key-value heads' query heads
        "ffn": lambda size: np.arange(size)[1 : 1 + size - round(0.8 * size / 4) * 4],
        "hidden": lambda size: np.arange(size)[-16:],
    }

    def change(model: ReferenceModel) -> None:
        graph = model.graph
        for node in graph.nodes:  # biases would give heads and channels a life of their own
            if node.op == "linear" and len(node.weights) > 1 and node.scope:
                model.weight(node.weights[1]).zero_()
        for name, kinds in weight_kinds(graph).items():
            weight = model.weight(name)
            for axis, kind in enumerate(kinds):
                if len(kinds) > 1 and kind in parts and kind in gone:
                    weight.index_fill_(axis, torch.from_numpy(gone[kind](weight.shape[axis])), 0.0)
            writes = len(kinds) > 1 and kinds[-1] in ("heads", "ffn")
            if "layers" in parts and layer_of(name) == 1 and writes:
                weight.zero_()

    return change


@pytest.mark.parametrize(
    "family, parts, importance",
    [
        *((family, "all", "activation") for family in FAMILIES),
        *((FAMILIES[0], part, "activation") for part in PARTS if part != "all"),
        *((family, "all", "taylor") for family in ("phi3", "qwen3_moe")),
    ],
)
def test_what_does_nothing_goes_without_a_trace(
    family: str, parts: str, importance: Any, tmp_path: Path
) -> None:
    model = save(family, tmp_path / "model", useless(PARTS[parts]), **NORM_EPS)
    work = job(model, tmp_path)
    facts = run(Structured(**PARTS[parts], **SMALL, importance=importance), work)
    before, after = facts["parameters"]
    assert after < before
    if "layers" in PARTS[parts]:
        assert 1 not in facts["layers"]
    torch.testing.assert_close(logits(work.out), logits(model), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_others_load_what_is_left(family: str, tmp_path: Path) -> None:
    model = save(family, tmp_path / "model")
    work = job(model, tmp_path)
    parts = {"ffn": 0.2, "layers": 0.3} if family == "gpt2" else PARTS["all"]
    run(Structured(**parts, **SMALL), work)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        work.out, torch_dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.inference_mode():
        expected = theirs.eval()(torch.from_numpy(TEXT[:36].astype(np.int64)).view(2, 18)).logits
    torch.testing.assert_close(logits(work.out), expected, rtol=1e-4, atol=1e-4)


def test_a_run_that_was_stopped_ends_with_the_same_bits(tmp_path: Path) -> None:
    config = Structured(**PARTS["all"], **SMALL)
    model = save("phi3", tmp_path / "model", dtype=torch.bfloat16)
    whole = job(model, tmp_path / "whole")
    run(config, whole)
    interrupted(lambda work: run(config, work), model, tmp_path / "stopped", every=6)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "stopped" / "out" / name).read_bytes() == (whole.out / name).read_bytes()


@pytest.mark.parametrize(
    "parts, message",
    [
        ({"heads": 0.95}, "leaves 0; one at least must stay"),
        ({"heads": 0.1}, "try 0.5 or more"),
        ({"ffn": 0.5, "ffn_multiple": 128}, "prune.ffn_multiple"),
        ({"layers": 0.1}, "leaves 3"),
    ],
)
def test_shares_that_leave_or_take_nothing_are_refused(
    parts: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = save("llama", tmp_path / "model")
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        run(Structured(**parts), job(model, tmp_path))


@pytest.mark.parametrize("part", ["heads", "hidden"])
def test_gpt2_cannot_have_fewer_heads_or_columns(part: str, tmp_path: Path) -> None:
    model = save("gpt2", tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match="neither heads nor hidden"):
        run(Structured(**{part: 0.5}, hidden_multiple=8), job(model, tmp_path))


def test_layers_whose_number_counts_stay(tmp_path: Path) -> None:
    model = save("gpt2-scaled-untied", tmp_path / "model", useless({"layers": 0.3}))
    with pytest.raises(UnsupportedModelError, match="layer's number"):
        run(Structured(layers=0.3), job(model, tmp_path))


def test_windows_stay_with_their_layers(tmp_path: Path) -> None:
    model = save("gemma2", tmp_path / "model", useless({"layers": 0.25}))
    work = job(model, tmp_path)
    run(Structured(layers=0.25), work)
    assert json.loads((work.out / "config.json").read_text())["layer_types"] == [
        "sliding_attention", "sliding_attention", "full_attention",
    ]  # fmt: skip
    assert set(CASES) >= set(FAMILIES)
