"""Pruning single weights of whole models: which matrices, in which tensors, stopped and gone on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from gossamer.backends.reference import ReferenceModel
from gossamer.checkpoint.safetensors import Checkpoint
from gossamer.checkpoint.weights import evaluate
from gossamer.compress.model import open_model
from gossamer.compress.prune import magnitude, sparsegpt, wanda
from gossamer.compress.step import Estimate
from gossamer.config.compression import Magnitude, SparseGPT, Wanda
from gossamer.errors import CheckpointError, ConfigError

from .small import TEXT, interrupted, job, logits, save

STEPS: dict[str, tuple[Any, Any]] = {
    "magnitude": (magnitude, Magnitude), "wanda": (wanda, Wanda), "sparsegpt": (sparsegpt, SparseGPT)
}  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "gemma2", "qwen3_moe"])
@pytest.mark.parametrize("method", STEPS)
def test_every_matrix_of_the_blocks_has_its_zeros_and_nothing_else_changed(
    family: str, method: str, tmp_path: Path
) -> None:
    module, config = STEPS[method]
    model = save(family, tmp_path / "model", dtype=torch.bfloat16)
    work = job(model, tmp_path)
    facts = module.run(config(pattern="2:4"), work)
    graph, before = open_model(model)
    after = Checkpoint(work.out)
    assert (work.out / "config.json").read_bytes() == (model / "config.json").read_bytes()
    assert after.names() == before.names()
    matrices = {
        name
        for node in graph.nodes
        for name in node.weights
        if node.scope and len(graph.weights[name].shape) > 1 and "router" not in name
    }
    assert set(facts["matrices"]) == matrices
    for name, weight in graph.weights.items():
        try:
            old = evaluate(weight.expr, before)
        except CheckpointError:
            continue
        new = evaluate(weight.expr, after)
        assert new.dtype == old.dtype
        if name not in matrices:
            assert np.array_equal(new, old), name
            continue
        columns = new.shape[-1] // 4 * 4  # what is behind them is a group of its own
        groups = (new != 0)[..., :columns].reshape(*new.shape[:-1], -1, 4).sum(-1)
        assert groups.max() <= 2, name
        assert facts["matrices"][name] == pytest.approx(1 - np.count_nonzero(new) / new.size)
        if method != "sparsegpt":
            assert np.array_equal(new[new != 0], old[new != 0]), name
    assert 0.48 < facts["sparsity"] < 0.52


def test_others_load_a_pruned_model(tmp_path: Path) -> None:
    work = job(save("phi3", tmp_path / "model"), tmp_path)
    sparsegpt.run(SparseGPT(), work)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(work.out, torch_dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = theirs(torch.from_numpy(TEXT[:36].astype(np.int64)).view(2, 18)).logits
    torch.testing.assert_close(logits(work.out), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe"])
def test_a_run_that_was_stopped_ends_with_the_same_bits(family: str, tmp_path: Path) -> None:
    model = save(family, tmp_path / "model", dtype=torch.bfloat16)
    whole = job(model, tmp_path / "whole")
    facts = sparsegpt.run(SparseGPT(sparsity=0.6), whole)
    interrupted(
        lambda work: sparsegpt.run(SparseGPT(sparsity=0.6), work), model, tmp_path / "stopped", every=3
    )
    again = (tmp_path / "stopped" / "out" / "model.safetensors").read_bytes()
    assert again == (whole.out / "model.safetensors").read_bytes()
    assert facts["sparsity"] == pytest.approx(0.6, abs=0.01)


def test_what_is_skipped_stays_whole(tmp_path: Path) -> None:
    model = save("phi3", tmp_path / "model")
    work = job(model, tmp_path)
    facts = magnitude.run(Magnitude(skip=("layers.0.*", "*.q_proj")), work)
    assert not [name for name in facts["matrices"] if "layers.0." in name or "q_proj" in name]
    graph, before = open_model(model)
    after = Checkpoint(work.out)
    for name in ("layers.0.mlp.gate_proj", "layers.1.attention.q_proj"):
        expr = graph.weights[name].expr
        assert np.array_equal(evaluate(expr, after), evaluate(expr, before))
    assert facts["matrices"]["layers.1.attention.k_proj"] == 0.5  # of the same tensor


def nan(model: ReferenceModel) -> None:
    model.weight("layers.1.mlp.gate_proj")[0, 0] = torch.nan


@pytest.mark.parametrize("method", STEPS)
def test_nan_weights_are_refused_by_name(method: str, tmp_path: Path) -> None:
    module, config = STEPS[method]
    model = save("llama", tmp_path / "model", nan)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.gate_proj\.weight holds NaN"):
        module.run(config(), job(model, tmp_path))


def test_mistakes_are_refused(tmp_path: Path) -> None:
    model = save("gpt2", tmp_path / "model")
    for config, fields, message in (
        (Wanda(), {"text": TEXT[:100]}, "100 tokens"),
        (Wanda(), {"context": 65, "samples": 2}, "reads 64 at most"),
        (Wanda(), {"text": TEXT + 50}, "vocabulary has 101"),
        (Wanda(skip=("layers.9.*",)), {}, "matches no matrix"),
        (Wanda(skip=("layers.*",)), {}, "names every matrix"),
    ):
        with pytest.raises(ConfigError, match=message):
            wanda.run(config, job(model, tmp_path, **fields))
    for bad in ({"sparsity": 1.0}, {"pattern": "2:4", "sparsity": 0.6}, {"pattern": "4:2"}, {"pattern": "x"}):
        with pytest.raises(ConfigError, match=r"prune\."):
            Wanda(**bad)  # type: ignore[arg-type]


def test_estimates_grow_with_what_is_done(tmp_path: Path) -> None:
    graph, _ = open_model(save("llama", tmp_path / "model"))
    made: list[Estimate] = [
        magnitude.estimate(Magnitude(), graph, 1000, 1e9),
        wanda.estimate(Wanda(), graph, 1000, 1e9),
        sparsegpt.estimate(SparseGPT(), graph, 1000, 1e9),
        sparsegpt.estimate(SparseGPT(), graph, 4000, 1e9),
    ]
    assert [e.seconds for e in made] == sorted({e.seconds for e in made})
    assert json.dumps([e.disk for e in made])
