from __future__ import annotations

import pytest

from gossamer.bench.ablation import quality
from gossamer.bench.ablation.arms import base
from gossamer.bench.ablation.quality import Qualities, Score, quality_effects, quality_figures
from gossamer.config import Quantization
from gossamer.quality.windows import Text


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


def test_every_format_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    calls = []
    whole = quality.measure

    def counted(config, *rest, **options):  # type: ignore[no-untyped-def]
        calls.append(config.quantization)
        return whole(config, *rest, **options)

    monkeypatch.setattr(quality, "measure", counted)
    text = Text("t", "It was a dark night, and the old house stood alone upon the hill. " * 30)
    found = Qualities("gossamer/pocket-half", [text], 200)
    plain, small = (base("gossamer/pocket-half"), base("gossamer/pocket-half", max_num_seqs=2))
    int4 = base("gossamer/pocket-half", mixed_precision=None, quantization=Quantization(format="int4"))
    first = found.score(plain, lambda *_: None)
    assert found.score(small, lambda *_: None) is first
    assert found.score(int4, lambda *_: None).kl > first.kl >= 0
    assert len(calls) == 2
    assert set(quality_figures(first)) == {"kl", "perplexity"}
