"""What is known of quality comes from files, and what is not is unknown."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from gossamer.errors import CheckpointError, ConfigError
from gossamer.passes.weight_formats import matrices
from gossamer.planner.objectives import QualityLimit
from gossamer.planner.quality import UNKNOWN, Loss, certified, read_sensitivity
from tests.planner.models import planned
from tests.quality.records import certificate

MODEL = planned(num_hidden_layers=8)


def units() -> list[dict[str, Any]]:
    """Each matrix alone; int8 loses 1e-4, int4-g32 ten or twenty times that."""
    found = []
    for index, (name, weight) in enumerate(matrices(MODEL.graph).items()):
        size = weight.shape[0] * weight.shape[1]
        found.append(
            {
                "names": [name],
                "weights": size,
                "chosen": "int8",
                "candidates": {
                    "int8": {"bytes": size, "kl": 1e-4},
                    "int4-g32": {"bytes": size * 9 // 16, "kl": 1e-3 * (1 + index % 2)},
                },
            }
        )
    return found


def odd(**changes: object) -> dict[str, object]:
    return {"names": ["x"], "weights": 3, "candidates": {"int8": {"bytes": 1, "kl": 1}}} | changes


def written(path: Path, **changes: object) -> Path:
    file = path / "gossamer_sensitivity.json"
    file.write_text(json.dumps({"version": 1, "model": "x", "method": "rtn", "matrices": units()} | changes))
    return file


def test_losses_add_up(tmp_path: Path) -> None:
    found = read_sensitivity(written(tmp_path), MODEL)
    assert found.uniform("int8").kl == pytest.approx(1e-4 * len(found.matrices))
    assert found.uniform("int8").source == "gossamer_sensitivity.json (of weights that are not here)"
    assert found.uniform("nf4") == UNKNOWN and not UNKNOWN.known


def test_a_file_that_knows_some_matrices_says_nothing_of_all(tmp_path: Path) -> None:
    found = read_sensitivity(written(tmp_path, matrices=units()[1:]), MODEL)
    assert found.uniform("int8") == UNKNOWN and found.front()


def test_the_front_is_no_worse_than_any_uniform_choice(tmp_path: Path) -> None:
    found = read_sensitivity(written(tmp_path), MODEL)
    front = found.front()
    assert front and all(a[1] > b[1] and a[2] < b[2] for a, b in pairwise(front))
    worst = found.uniform("int4-g32").kl
    assert worst is not None and all(4.5 < bits < 8.0 and kl < worst for _, bits, kl in front)
    # Where bits are few the matrices that lose less of them go first.
    chosen = dict(zip((unit.names[0] for unit in found.matrices), front[0][0], strict=True))
    kl = {u.names[0]: u.candidates["int4-g32"].kl / u.weights for u in found.matrices}
    low = [name for name, stored in chosen.items() if stored == "int4-g32"]
    assert max(kl[name] for name in low) <= min(kl[name] for name in chosen if name not in low) * 1.001


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"version": 2}, "version 2"),
        ({"method": "gptq"}, 'method = "rtn"'),
        ({"matrices": [odd(names=["embedding"])]}, "another"),
        ({"matrices": [odd(candidates={"int8": {"bytes": 1, "kl": "nan"}})]}, "kl"),
        ({"matrices": [odd(names=[])]}, "without names"),
        ({"matrices": []}, "no matrices"),
        ({"matrices": [odd(candidates={"int99": {"bytes": 1, "kl": 1}})]}, "int99"),
        ({"matrices": 3}, "matrices"),
    ],
)  # fmt: skip
def test_files_that_cannot_be(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    with pytest.raises((CheckpointError, ConfigError), match=words):
        read_sensitivity(written(tmp_path, **changes), MODEL)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="mixed_bits"):
        read_sensitivity(tmp_path / "gossamer_sensitivity.json", MODEL)


def test_a_limit_holds_only_where_the_loss_is_known() -> None:
    assert Loss(kl=0.01).within(QualityLimit(kl=0.02)) and not Loss(kl=0.03).within(QualityLimit(kl=0.02))
    assert not Loss(kl=0.01).within(QualityLimit(ratio=1.5)) and not UNKNOWN.within(QualityLimit(kl=9.0))
    assert str(UNKNOWN) == "unknown" and "1.01" in str(Loss(ratio=1.01))


def test_a_certificate_speaks_of_the_model_as_it_was_measured() -> None:
    known = certificate()
    assert known.quality is not None and known.quality.reference is not None
    loss = certified(known, "bf16")
    assert (
        loss.kl == known.quality.reference.divergence.kl_mean and loss.ratio == known.quality.reference.ratio
    )
    assert certified(known, "int8") == certified(None, "bf16") == UNKNOWN
    assert certified(replace(known, quality=None), "bf16") == UNKNOWN
