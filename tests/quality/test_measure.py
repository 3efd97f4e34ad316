"""Whole measurements: a reference with its noise, the torch reference beside, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from gossamer.checkpoint.hub import resolve_model
from gossamer.config import EngineConfig, ParallelComputing, Quantization
from gossamer.errors import ConfigError
from gossamer.quality import measure as module
from gossamer.quality.measure import measure, reference_config, serving_config
from gossamer.quality.report import Quality
from gossamer.quality.windows import Text

POCKET = "gossamer/pocket"
TEXTS = [
    Text("storm", "The storm came up from the sea, and the ship was driven upon the rocks. " * 14),
    Text("letter", "My dear sir, I have received your letter, and I am much obliged to you for it. " * 14),
]
SERVED = EngineConfig(
    model=POCKET, quantization=Quantization.parse("int4"), parallel_computing=ParallelComputing(threads=1)
)


def run(config: EngineConfig = SERVED, **options: object) -> Quality:
    return measure(config, TEXTS, context=128, **options)  # type: ignore[arg-type]


def test_a_measurement_has_all_its_parts() -> None:
    seen: dict[str, list[tuple[int, int]]] = {}
    quality = run(
        reference=reference_config(POCKET, SERVED),
        beside=True,
        max_tokens=300,
        progress=lambda what, done, total: seen.setdefault(what, []).append((done, total)),
    )
    assert (quality.context, quality.stride, quality.bos) == (128, 96, False)
    assert [text.tokens for text in quality.texts] == [150, 150]
    assert quality.total is not None and quality.total.tokens == 300
    found = quality.reference
    assert found is not None and found.noise is not None
    # The reference is fp32 in torch; what its kernels make of it is far below what int4 costs.
    assert found.execution.formats == {"f32": 1.0} and found.execution.backend == "reference"
    assert found.noise.execution.backend == "cpu"
    assert found.noise.divergence.kl_mean < 1e-9 < 1e-3 < found.divergence.kl_mean
    assert found.divergence.kl_mean < found.divergence.kl_p95 <= found.divergence.kl_p99
    assert found.ratio == pytest.approx(quality.total.perplexity / found.score.perplexity)
    assert found.ratio == pytest.approx(math.exp(quality.total.loss - found.score.loss))
    # int4 x int8 kernels beside the same formats in torch: far nearer than fp32 is.
    assert quality.beside is not None and quality.beside.execution.formats == quality.execution.formats
    assert quality.beside.divergence.kl_mean < found.divergence.kl_mean / 5
    assert quality.beside.served == pytest.approx(quality.total.perplexity)
    assert "linear_int4" in quality.execution.kernels
    assert {f"{POCKET} against its reference", "the torch reference beside"} < seen.keys()
    assert all(calls[-1][0] == calls[-1][1] for calls in seen.values())
    again = TypeAdapter(Quality).validate_json(json.dumps(asdict(quality)), strict=True)
    assert again == quality


def test_without_torch_the_kernels_are_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    with_torch = run(reference=reference_config(POCKET, SERVED)).reference
    monkeypatch.setattr(module, "has_torch", lambda: False)
    other = reference_config(POCKET, SERVED)
    assert other.backend == "cpu"
    found = run(reference=other).reference
    assert found is not None and with_torch is not None
    assert found.ratio == pytest.approx(with_torch.ratio, rel=1e-5)
    assert found.divergence.kl_mean == pytest.approx(with_torch.divergence.kl_mean, rel=1e-3)
    if found.noise is not None:  # there is another instruction set
        assert found.noise.execution.isa != found.execution.isa
        assert found.noise.divergence.kl_mean < 1e-9


def test_a_model_against_itself_loses_nothing() -> None:
    same = replace(reference_config(POCKET, SERVED), backend="cpu")
    found = run(same, reference=same).reference
    assert found is not None and found.ratio == 1 and found.ratio_error == 0
    assert found.divergence.kl_p99 == 0 and found.divergence.top1 == 1


def test_a_model_of_another_tokenizer_is_no_reference(shared: Path) -> None:
    other = reference_config(str(shared / "models" / "stories260K"), SERVED)
    with pytest.raises(ConfigError, match="their tokenizers differ"):
        run(reference=other)


def test_a_copy_with_the_same_tokenizer_is_a_reference(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(resolve_model(POCKET) / name, tmp_path / name)
    found = run(
        serving_config(str(tmp_path), threads=1), reference=reference_config(POCKET, SERVED), max_tokens=60
    )
    assert found.execution.formats == {"bf16": 1.0} and found.execution.kv == "bf16"
    assert found.reference is not None and found.reference.ratio == pytest.approx(1, abs=1e-3)


def test_what_there_is_nothing_to_measure_with_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to measure with"):
        measure(SERVED, [])


def test_progress_may_stop_it() -> None:
    class Enough(Exception):
        pass

    def stop(what: str, done: int, total: int) -> None:
        if "against" in what:
            raise Enough

    with pytest.raises(Enough):
        run(reference=reference_config(POCKET, SERVED), progress=stop)
