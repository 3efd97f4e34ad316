"""Sampling advice of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gossamer.checkpoint.generation_config import GenerationDefaults, read_generation_config
from gossamer.errors import CheckpointError


def write(directory: Path, **files: Any) -> Path:
    for name, value in files.items():
        (directory / f"{name}.json").write_text(json.dumps(value))
    return directory


def test_absence_advises_nothing(tmp_path: Path) -> None:
    assert read_generation_config(tmp_path) == GenerationDefaults()


def test_values_are_taken(tmp_path: Path) -> None:
    advice = {"do_sample": True, "temperature": 1, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}
    ends = {"eos_token_id": [7, 8, 7], "bos_token_id": 1, "pad_token_id": 3, "transformers_version": "4"}
    got = read_generation_config(write(tmp_path, generation_config=advice | ends))
    assert got == GenerationDefaults(
        temperature=1.0, top_k=20, top_p=0.8, repetition_penalty=1.05, eos_token_ids=(7, 8)
    )
    assert isinstance(got.temperature, float)


def test_no_sampling_means_greedy(tmp_path: Path) -> None:
    advice = {"do_sample": False, "temperature": 0.7}
    assert read_generation_config(write(tmp_path, generation_config=advice)).temperature == 0


def test_ends_fall_back_on_config(tmp_path: Path) -> None:
    write(tmp_path, generation_config={"eos_token_id": None}, config={"eos_token_id": 2, "bos_token_id": 0})
    got = read_generation_config(tmp_path)
    assert got.eos_token_ids == (2,)
    write(tmp_path, config={"text_config": {"eos_token_id": [1, 106]}})
    assert read_generation_config(tmp_path).eos_token_ids == (1, 106)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1), ("temperature", "hot"), ("temperature", True), ("top_k", 1.5), ("top_k", -2),
        ("top_p", 0), ("top_p", 1.1), ("min_p", -0.1), ("repetition_penalty", 0), ("max_new_tokens", 0),
        ("eos_token_id", "</s>"), ("eos_token_id", [1, -1]), ("do_sample", "no"),
    ],
)  # fmt: skip
def test_damage_is_named(tmp_path: Path, name: str, value: Any) -> None:
    write(tmp_path, generation_config={name: value})
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {name} is .*allowed is"):
        read_generation_config(tmp_path)


def test_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_generation_config(tmp_path)
