from __future__ import annotations

from types import SimpleNamespace

import pytest

from gossamer.bench.ablation import quality
from gossamer.bench.ablation.arms import base
from gossamer.bench.ablation.quality import Qualities, Score, quality_effects, quality_figures
from gossamer.config import EngineConfig, Quantization
from gossamer.quality.windows import Text

MODEL = "gossamer/pocket-half"
TEXT = Text("t", "It was a dark night, and the old house stood alone upon the hill. " * 30)
INT4 = base(MODEL, mixed_precision=None, quantization=Quantization(format="int4"))


def score(ratio: float, error: float | None = 0.002) -> Score:
    return Score(kl=0.01, perplexity=30 * ratio, ratio=ratio, error=error)


def test_perplexity_is_compared_through_the_fp32_model() -> None:
    (found,) = quality_effects(score(1.0), score(1.05))
    assert found.metric == "perplexity" and found.verdict == "loses" and found.ratio == pytest.approx(1.05)
    assert quality_effects(score(1.0), score(1.004))[0].verdict == "no difference"
    assert quality_effects(score(1.05), score(1.0))[0].verdict == "gains"


def test_one_window_leaves_it_open() -> None:
    (found,) = quality_effects(score(1.0), score(1.2, None))
    assert found.verdict == "no difference" and found.low < 1 < found.high


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[EngineConfig]:
    """The configurations that were measured."""
    calls: list[EngineConfig] = []

    def fake(config: EngineConfig, *_: object, **options: object) -> SimpleNamespace:
        calls.append(config)
        divergence = SimpleNamespace(kl_mean=0.01 * len(calls))
        reference = SimpleNamespace(divergence=divergence, ratio=1.1, ratio_error=0.011)
        return SimpleNamespace(reference=reference, total=SimpleNamespace(perplexity=33.0))

    monkeypatch.setattr(quality, "measure", fake)
    return calls


def test_every_format_is_measured_once(measured: list[EngineConfig]) -> None:
    found = Qualities(MODEL, [TEXT], 200)
    first = found.score(base(MODEL), lambda *_: None)
    assert first == Score(kl=0.01, perplexity=33.0, ratio=1.1, error=pytest.approx(0.01))
    assert found.score(base(MODEL, max_num_seqs=2), lambda *_: None) is first
    assert found.score(INT4, lambda *_: None).kl == 0.02
    assert found.score(base("a student"), lambda *_: None).kl == 0.03
    assert len(measured) == 3
    assert set(quality_figures(first)) == {"kl", "perplexity"}


def test_without_text_there_is_nothing_to_measure() -> None:
    assert Qualities(MODEL, [TEXT], 200) and not Qualities(MODEL, [], 200)


@pytest.mark.slow
def test_int4_is_further_from_fp32_than_bf16_is() -> None:
    pytest.importorskip("torch")
    found = Qualities(MODEL, [TEXT], 200)
    bf16, int4 = (found.score(config, lambda *_: None) for config in (base(MODEL), INT4))
    assert int4.kl > bf16.kl >= 0
