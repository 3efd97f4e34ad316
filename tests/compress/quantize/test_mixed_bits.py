"""Mixed bits: losses are what the whole model loses, and budgets are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gossamer.backends.reference import ReferenceModel
from gossamer.compress.model import open_model
from gossamer.compress.quantize import mixed_bits
from gossamer.compress.quantize.sensitivity import Sensitivity, divergence
from gossamer.compress.step import Stopped
from gossamer.config.compression import MixedBits
from gossamer.errors import ConfigError
from gossamer.graph.ops.formats import round_weight
from tests.compress.quantize.small import floats_of, make_job, make_model

CANDIDATES = ("int4-g64", "int4-g32", "int8")
WINDOWS = np.random.default_rng(3).integers(3, 101, (3, 24)).astype(np.int32)


@pytest.mark.parametrize("model", ["llama", "tied", "mixtral"])
def test_a_loss_is_the_divergence_of_the_whole_model(tmp_path: Path, model: str) -> None:
    graph, source = open_model(make_model(tmp_path / "model", model))
    ids = torch.from_numpy(WINDOWS.astype(np.int64))
    reference = ReferenceModel.load(graph, source).logits(ids)
    sensitivity = Sensitivity(graph, source, WINDOWS)
    asked = 0
    for block, loss in sensitivity:
        assert loss() == pytest.approx(0.0, abs=1e-6)
        names = ["embedding"] if block is None else [w for w in block.model.graph.weights if "down" in w]
        for name in names:
            weight = sensitivity.model.weight(name)
            before = weight.clone()
            weight.copy_(round_weight(before, "int4", 32))
            whole = ReferenceModel.load(graph, source)
            with torch.no_grad():
                whole.weight(name).copy_(weight)
                direct = float(divergence(reference, whole.logits(ids)).mean())
            assert loss() == pytest.approx(direct, rel=1e-3, abs=1e-6)
            assert direct > 1e-6
            weight.copy_(before)
            asked += 1
    assert asked == 3


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("model", ["llama", "mixtral"])
def test_a_budget_is_kept_and_the_record_says_why(tmp_path: Path, model: str, method: Any) -> None:
    directory = make_model(tmp_path / "model", model)
    config = MixedBits(candidates=CANDIDATES, average_bits=5.0, method=method, windows=4)
    job = make_job(directory, tmp_path)
    facts = mixed_bits.run(config, job)
    assert len(facts["matrices"]) >= 2 and 4.25 <= facts["average_bits"] <= 5.0
    record = json.loads((job.out / mixed_bits.SENSITIVITY).read_text())
    chosen = [unit["candidates"][unit["chosen"]] for unit in record["matrices"]]
    assert sum(c["bytes"] for c in chosen) == facts["quantized_bytes"]
    assert sum(c["kl"] for c in chosen) == pytest.approx(record["predicted_kl"])
    for unit in record["matrices"]:
        losses = unit["candidates"]
        assert losses["int8"]["kl"] < losses["int4-g32"]["kl"] and losses["int8"]["bytes"] > 0
    graph, _ = open_model(directory)
    named = [name for unit in record["matrices"] for name in unit["names"]]
    assert len(named) == len(set(named)) and set(named) <= set(graph.weights)
    if model == "mixtral":
        assert ["layers.0.mlp.gate_experts", "layers.0.mlp.up_experts"] in [
            unit["names"] for unit in record["matrices"]
        ]
    assert floats_of(job.out)  # is whole


def test_a_limit_of_divergence_gives_the_smallest_model_within_it(tmp_path: Path) -> None:
    directory = make_model(tmp_path / "model", "llama")
    sizes, most = [], 10.0
    for i in range(3):
        job = make_job(directory, tmp_path / str(i))
        facts = mixed_bits.run(MixedBits(candidates=CANDIDATES, max_kl=most, method="rtn", windows=4), job)
        assert facts["predicted_kl"] <= most
        sizes.append(facts["quantized_bytes"])
        most = facts["predicted_kl"] / 2
    assert sizes[0] < sizes[1] < sizes[2]


def test_measurements_outlive_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make_model(tmp_path / "model", "llama")
    config = MixedBits(candidates=CANDIDATES, average_bits=5.0, method="rtn", windows=4)
    whole = make_job(directory, tmp_path / "whole")
    mixed_bits.run(config, whole)
    asked = iter(range(100))
    with pytest.raises(Stopped):
        mixed_bits.run(config, make_job(directory, tmp_path / "again", stopping=lambda: next(asked) == 3))
    measured: list[int] = []
    block = mixed_bits._measure_block
    monkeypatch.setattr(mixed_bits, "_measure_block", lambda *a: measured.append(1) or block(*a))
    again = make_job(directory, tmp_path / "again")
    mixed_bits.run(config, again)
    assert len(measured) == 1  # of four blocks
    for path in whole.out.iterdir():
        assert path.read_bytes() == (again.out / path.name).read_bytes()


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        ({"average_bits": 4.1}, r"4\.1, and the smallest of all candidates take 4\.\d+ bits"),
        ({"max_bytes": 1000}, r"1000 bytes is below the \d+"),
        ({"max_kl": 1e-9}, r"1e-09 is below the"),
    ],
)
def test_what_cannot_be_met_is_refused_with_the_least(
    tmp_path: Path, limit: dict[str, Any], said: str
) -> None:
    job = make_job(make_model(tmp_path / "model", "llama"), tmp_path)
    with pytest.raises(ConfigError, match=said):
        mixed_bits.run(MixedBits(candidates=CANDIDATES, method="rtn", windows=2, **limit), job)
    assert not list(job.out.iterdir())
