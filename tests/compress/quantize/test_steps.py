"""The steps from directory to directory: what is written, what goes on after a stop, what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from gossamer.backends.reference import ReferenceModel
from gossamer.checkpoint.hub import read_quantization
from gossamer.checkpoint.model_writer import write_weights
from gossamer.checkpoint.safetensors import Checkpoint
from gossamer.compress.model import open_model
from gossamer.compress.quantize import gptq, rtn
from gossamer.compress.quantize.sensitivity import divergence
from gossamer.compress.step import Job, Stopped
from gossamer.config.compression import GPTQ, RTN
from gossamer.errors import CheckpointError, ConfigError
from gossamer.graph.ops.formats import round_weight
from tests.compress.quantize.small import floats_of, make_job, make_model

IDS = torch.from_numpy(np.random.default_rng(7).integers(3, 101, (4, 32)))


def logits(directory: Path, tensors: dict[str, np.ndarray] | None = None) -> torch.Tensor:
    """Of the original, or with other tensors in its place."""
    graph, source = open_model(directory)
    if tensors is not None:
        source = type("Tensors", (Checkpoint,), {"read": lambda self, name: tensors[name]})(directory)
    with torch.inference_mode():
        return ReferenceModel.load(graph, source).logits(IDS)


@pytest.mark.parametrize("model", ["llama", "tied", "phi3", "mixtral"])
@pytest.mark.parametrize("format", ["int4-g32", "uint4-g64", "int8"])
def test_rounding_is_what_quantization_at_load_makes(tmp_path: Path, model: str, format: str) -> None:
    directory = make_model(tmp_path / "model", model)
    job = make_job(directory, tmp_path)
    facts = rtn.run(RTN(format=format, overrides=(("layers.1.*", "int8-g32"),)), job)
    before, after = Checkpoint(directory), floats_of(job.out)
    assert set(after) == set(before.names())
    coded = 0
    for name, values in after.items():
        weight = torch.from_numpy(before.read(name).astype(np.float32))
        floats = weight.ndim == 1 or "gate.weight" in name or (model == "tied" and "embed" in name)
        if not floats:
            stored = "int8-g32" if ".layers.1." in name else format
            kind, _, group = stored.partition("-g")
            weight = round_weight(weight, kind, int(group or 0))
            coded += 1
        np.testing.assert_array_equal(values, weight.numpy(), name)
    assert coded > 0 and sum(facts["matrices"].values()) > 0
    assert ("embedding" in facts["floats"]) == (model == "tied")


@pytest.mark.parametrize("model", ["llama", "phi3"])
def test_gptq_loses_less_than_rounding(tmp_path: Path, model: str) -> None:
    directory = make_model(tmp_path / "model", model)
    reference = logits(directory)
    losses = {}
    for name, run, config in (("rtn", rtn.run, RTN), ("gptq", gptq.run, GPTQ)):
        job = make_job(directory, tmp_path / name, samples=48)
        run(config(format="int4-g32", overrides=(("embedding", "f32"),)), job)
        other = logits(directory, floats_of(job.out))
        losses[name] = float(divergence(reference, other).mean())
    assert losses["gptq"] < 0.8 * losses["rtn"]


def test_transformers_loads_what_was_written(tmp_path: Path) -> None:
    directory = make_model(tmp_path / "model", "llama")
    job = make_job(directory, tmp_path)
    gptq.run(GPTQ(format="int4-g32", overrides=(("layers.*.mlp.down_proj", "int4-g64"),)), job)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(job.out, dtype=torch.float32).eval()
    with torch.inference_mode():
        theirs = loaded(IDS).logits
    torch.testing.assert_close(theirs, logits(directory, floats_of(job.out)), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("model", "at"), [("mixtral", 1), ("llama", 3)])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    tmp_path: Path, model: str, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_model(tmp_path / "model", model)
    config = GPTQ(format="int4-g32")
    whole = make_job(directory, tmp_path / "whole")
    gptq.run(config, whole)
    asked = iter(range(100))
    with pytest.raises(Stopped):
        gptq.run(config, make_job(directory, tmp_path / "again", stopping=lambda: next(asked) == at))
    made: list[str] = []
    block = gptq.gptq_block

    def counted(*args: Any) -> Any:
        made.append(args[0].scope)
        return block(*args)

    monkeypatch.setattr(gptq, "gptq_block", counted)
    again = make_job(directory, tmp_path / "again")
    gptq.run(config, again)
    assert len(made) == 4 - at
    for name in ("model.safetensors", "config.json"):
        assert (again.out / name).read_bytes() == (whole.out / name).read_bytes()


def refusals(job: Job, config: RTN | GPTQ) -> str:
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        (gptq if isinstance(config, GPTQ) else rtn).run(config, job)
    assert not list(job.out.iterdir())
    return str(caught.value)


@pytest.mark.parametrize(
    ("model", "fields", "said"),
    [
        ("tied", {"overrides": (("head", "int8"),)}, "embedding cannot be int8 .* at load"),
        ("gpt2", {}, "nothing is left to quantize: .*Conv1D.* --quantization int4-g32"),
        ("llama", {"format": "int4-g128"}, "64 inputs, which groups of 128 .* do not divide"),
        ("phi3", {"overrides": (("layers.0.attention.q_proj", "int8"),)}, "lie in one tensor.*both the same"),
        ("llama", {"overrides": (("layers.*.ffn", "int8"),)}, "matches no matrix"),
    ],
)
def test_formats_that_cannot_be(tmp_path: Path, model: str, fields: dict[str, Any], said: str) -> None:
    job = make_job(make_model(tmp_path / "model", model), tmp_path)
    for config in (RTN, GPTQ):
        assert re.search(said, refusals(job, config(**{"format": "int4-g32", **fields})))


def test_text_that_is_too_short_and_weights_that_are_not_numbers(tmp_path: Path) -> None:
    directory = make_model(tmp_path / "model", "llama")
    job = make_job(directory, tmp_path, text=np.zeros(100, np.int32))
    assert "has 100 tokens" in refusals(job, GPTQ(format="int4-g32"))
    checkpoint = Checkpoint(directory)
    tensors = {name: checkpoint.read(name).copy() for name in checkpoint.names()}
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    write_weights(directory, tensors)
    for config in (RTN, GPTQ):
        said = refusals(make_job(directory, tmp_path), config(format="int4-g32"))
        assert "model.layers.1.mlp.up_proj.weight holds NaN" in said


def test_a_model_is_quantized_once(tmp_path: Path) -> None:
    directory = make_model(tmp_path / "model", "llama")
    first = make_job(directory, tmp_path / "first")
    rtn.run(RTN(format="int8"), first)
    assert read_quantization(first.out) is not None
    with pytest.raises(Exception, match="quantiz"):
        rtn.run(RTN(format="int4-g32"), make_job(first.out, tmp_path / "second"))
