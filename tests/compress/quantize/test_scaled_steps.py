"""AWQ, SmoothQuant and KV calibration from directory to directory, on models whose channels differ."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from gossamer.backends.reference import ReferenceModel
from gossamer.checkpoint.hub import read_config, read_quantization
from gossamer.checkpoint.model_writer import write_weights
from gossamer.checkpoint.safetensors import Checkpoint
from gossamer.compress.model import open_model
from gossamer.compress.quantize import awq, kv_calibration, rtn, smoothquant
from gossamer.compress.quantize.plan import formats_of
from gossamer.compress.quantize.sensitivity import divergence
from gossamer.compress.step import Job, Stopped
from gossamer.config.compression import AWQ, RTN, KVCalibration, SmoothQuant
from gossamer.errors import ConfigError
from gossamer.graph.ops.attention import KVState, SpanRows
from gossamer.graph.weights import leaves
from tests.compress.quantize.small import floats_of, make_job, make_model

OUTSIDE = (("embedding", "f32"), ("head", "f32"))
IDS = torch.from_numpy(np.random.default_rng(7).integers(3, 101, (4, 32)))
STEPS: dict[str, tuple[Any, Any]] = {
    "awq": (awq, AWQ(format="int4-g32", grid=5)),
    "awq-overrides": (awq, AWQ(format="uint4-g32", grid=5, clip=False, overrides=(("*.down*", "bf16"),))),
    "smoothquant": (smoothquant, SmoothQuant(activations="static")),
    "kv": (kv_calibration, KVCalibration()),
}


def make_uneven(directory: Path, name: str) -> Path:
    """A model some of whose channels are much larger than others: of norms, keys and values."""
    make_model(directory, name)
    source = Checkpoint(directory)
    tensors = {name: source.read(name).copy() for name in source.names()}
    for tensor, array in tensors.items():
        if tensor.endswith(("layernorm.weight", "ln_1.weight", "ln_2.weight")):
            array[::9] *= 12
        if tensor.endswith(("k_proj.weight", "v_proj.weight", "up_proj.weight", "w3.weight")):
            array[::7] *= 12
    (directory / "model.safetensors").unlink()
    write_weights(directory, tensors)
    return directory


def served(model: Path, job: Job, format: str, overrides: Any) -> ReferenceModel:
    """What a step wrote, weights and activations rounded as kernels see them."""
    graph, _ = open_model(model)
    floats = floats_of(job.out)
    ends = ".input_scale"
    scales = {n.removesuffix(ends): float(a[0]) for n, a in floats.items() if n.endswith(ends)}
    weights = dict(graph.weights)
    for name, choice in formats_of(graph, format, overrides).items():
        tensor = next(leaves(graph.weights[name].expr)).name.removesuffix(".weight")
        weights[name] = replace(
            weights[name],
            format=choice.format,
            group=choice.group,
            activation_scale=scales.get(tensor, 0.0),
        )
    rows = {"read": lambda self, n: floats[n], "read_rows": lambda self, n, a, b: floats[n][a:b]}
    source = type("Tensors", (Checkpoint,), rows)(model)
    shadow = ReferenceModel(replace(graph, weights=weights))
    shadow.load_state_dict(ReferenceModel.load(graph, source).state_dict())
    return shadow.requires_grad_(False)


def plain(directory: Path) -> ReferenceModel:
    return ReferenceModel.load(*open_model(directory)).requires_grad_(False)


def lost(model: Path, job: Job, format: str) -> float:
    return float(divergence(plain(model).logits(IDS), served(model, job, format, OUTSIDE).logits(IDS)).mean())


@pytest.mark.parametrize("name", ["llama", "phi3", "mixtral"])
def test_awq_loses_less_than_rounding(tmp_path: Path, name: str) -> None:
    model = make_uneven(tmp_path / "model", name)
    rounded, job = (make_job(model, tmp_path / n, samples=32) for n in ("rtn", "awq"))
    rtn.run(RTN(format="int4-g32", overrides=OUTSIDE), rounded)
    facts = awq.run(AWQ(format="int4-g32", overrides=OUTSIDE), job)
    assert facts["method"] == "awq"
    assert lost(model, job, "int4-g32") < 0.75 * lost(model, rounded, "int4-g32")


@pytest.mark.parametrize("name", ["llama", "phi3", "mixtral"])
@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_smoothing_loses_less_than_rounding(tmp_path: Path, name: str, activations: Any) -> None:
    model = make_uneven(tmp_path / "model", name)
    rounded, job = (make_job(model, tmp_path / n, samples=32) for n in ("rtn", "smooth"))
    rtn.run(RTN(format="int8", overrides=OUTSIDE), rounded)
    smoothquant.run(SmoothQuant(activations=activations, overrides=OUTSIDE), job)
    settings = read_quantization(job.out)
    assert settings is not None
    groups = settings["config_groups"].values()
    assert {g["input_activations"]["dynamic"] for g in groups} == {activations == "dynamic"}
    limit = 0.6 if activations == "dynamic" else 1.0
    assert lost(model, job, "int8") < limit * lost(model, rounded, "int8")


@pytest.mark.parametrize("static", [False, True])
def test_transformers_loads_scaled_models(tmp_path: Path, static: bool) -> None:
    model = make_uneven(tmp_path / "model", "llama")
    job = make_job(model, tmp_path)
    if static:
        smoothquant.run(SmoothQuant(activations="static", overrides=OUTSIDE), job)
    else:
        awq.run(AWQ(format="int4-g32", grid=5, overrides=OUTSIDE), job)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(job.out, dtype=torch.float32).eval()
    with torch.inference_mode():
        theirs = loaded(IDS).logits
    ours = served(model, job, "int8" if static else "int4-g32", OUTSIDE)
    if not static:  # they leave the activations of such layers in floats
        graph = ours.graph
        floats = {n: replace(w, format="f32", group=0) for n, w in graph.weights.items()}
        exact = ReferenceModel(replace(graph, weights=floats))
        exact.load_state_dict(ours.state_dict())
        ours = exact.requires_grad_(False)
    exact_logits = plain(model).logits(IDS)
    kept, other = divergence(ours.logits(IDS), theirs), divergence(exact_logits, theirs)
    assert float(kept.mean()) < 0.05 * float(other.mean())


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("name", "at"), [("mixtral", 3), ("llama", 1)])
def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path: Path, name: str, at: int, step: str) -> None:
    model = make_uneven(tmp_path / "model", name)
    module, config = STEPS[step]
    whole = make_job(model, tmp_path / "whole")
    module.run(config, whole)
    asked = iter(range(100))
    with pytest.raises(Stopped):
        module.run(config, make_job(model, tmp_path / "again", stopping=lambda: next(asked) == at))
    finished = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "again" / "scratch").iterdir()}
    assert len(finished) == at
    again = make_job(model, tmp_path / "again")
    module.run(config, again)
    assert finished.items() <= {p.name: p.stat().st_mtime_ns for p in again.scratch.iterdir()}.items()
    for file in ("model.safetensors", "config.json"):
        assert (again.out / file).read_bytes() == (whole.out / file).read_bytes()


def kv_loss(model: ReferenceModel, reference: ReferenceModel, format: str) -> float:
    ids, rows = IDS.flatten(), torch.arange(IDS.numel())
    spans = tuple(SpanRows(b, b * 32, 32, 0) for b in range(4))
    out = model(ids, rows % 32, rows, KVState(spans, format=format))["logits"]
    return float(divergence(reference.logits(IDS).flatten(0, 1), out).mean())


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_balanced_caches_lose_less_and_floats_nothing(tmp_path: Path, name: str) -> None:
    model = make_uneven(tmp_path / "model", name)
    job = make_job(model, tmp_path, samples=32)
    facts = kv_calibration.run(KVCalibration(format="int4"), job)
    before, after = plain(model), plain(job.out)
    torch.testing.assert_close(after.logits(IDS), before.logits(IDS), rtol=1e-3, atol=1e-4)
    assert Checkpoint(job.out).names() == Checkpoint(model).names()
    assert read_config(job.out) == read_config(model)
    for errors in facts["attention_error"].values():
        assert errors["after"] <= errors["before"]
    if name in ("llama", "mixtral"):  # whose keys and values were made uneven
        assert kv_loss(after, before, "int4") < 0.7 * kv_loss(before, before, "int4")


def test_a_layer_that_gains_nothing_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(tmp_path / "model", "llama")

    def harmful(x: torch.Tensor, scaling: Any) -> Any:
        factors = torch.ones(scaling.size)
        factors[0] = 1e-3
        yield factors

    monkeypatch.setattr(kv_calibration, "candidates", harmful)
    job = make_job(model, tmp_path)
    facts = kv_calibration.run(KVCalibration(), job)
    assert facts["changed_tensors"] == 0
    before, after = Checkpoint(model), Checkpoint(job.out)
    assert all(np.array_equal(before.read(n), after.read(n)) for n in before.names())


@pytest.mark.parametrize("step", STEPS)
def test_what_is_quantized_is_not_quantized_again(tmp_path: Path, step: str) -> None:
    model = make_model(tmp_path / "model", "llama")
    first = make_job(model, tmp_path / "first")
    rtn.run(RTN(format="int8"), first)
    module, config = STEPS[step]
    second = make_job(first.out, tmp_path / "second")
    with pytest.raises(ConfigError, match=r"quantize last|quantized"):
        module.run(config, second)
    assert not list(second.out.iterdir())
