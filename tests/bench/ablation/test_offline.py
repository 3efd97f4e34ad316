from __future__ import annotations

from pathlib import Path

import pytest

from gossamer.bench.ablation import offline
from gossamer.bench.ablation.arms import base
from gossamer.bench.ablation.offline import make_pruned, make_student, split_texts
from gossamer.errors import ConfigError
from gossamer.quality.windows import Text
from gossamer.runtime.start import load_graph, plan_start

MODEL = "gossamer/pocket-half"
TEXT = Text(
    "t", "".join(f"On day {i} the old man walked to the harbour and counted {i} ships.\n" for i in range(800))
)


def test_what_trains_is_not_what_is_measured() -> None:
    (train,), (held,) = split_texts([TEXT])
    assert train.text + held.text == TEXT.text and held.text.startswith("\n")
    assert 0.65 < len(train.text) / len(TEXT.text) < 0.71
    ((short,), (rest,)) = split_texts([Text("s", "abcdefghij")])
    assert short.text + rest.text == "abcdefghij" and rest.text


def test_what_takes_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr(offline, "_MOST_SECONDS", 0)
    with pytest.raises(ConfigError, match="gossamer compress"):
        make_student(MODEL, [TEXT], tmp_path, lambda *_: None)


@pytest.mark.slow
def test_a_pruned_model_is_smaller_in_memory(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    made = make_pruned(MODEL, [TEXT], tmp_path, lambda *_: None)
    weights = []
    for model in (MODEL, str(made)):
        graph, _, _ = load_graph(base(model))
        weights.append(plan_start(graph, base(model)).memory.weights)
    assert weights[1] < 0.85 * weights[0]
