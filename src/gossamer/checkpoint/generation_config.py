"""generation_config.json: what the model's makers advise for sampling, and where its text ends."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gossamer.checkpoint.json_file import read_json_object
from gossamer.errors import CheckpointError

__all__ = ["GenerationDefaults", "read_generation_config"]

MAX_BYTES = 1 << 20
# name -> (lowest, highest, whole number, lowest itself is excluded)
_RANGES: Mapping[str, tuple[float, float, bool, bool]] = {
    "temperature": (0, 100, False, False),
    "top_k": (-1, 2**31 - 1, True, False),
    "top_p": (0, 1, False, True),
    "min_p": (0, 1, False, False),
    "repetition_penalty": (0.01, 100, False, False),
    "max_new_tokens": (1, 2**31 - 1, True, False),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """Sampling defaults of a model; None means that it advises nothing.

    temperature is 0 where the file says do_sample: false. top_k 0 or -1 means all. eos_token_ids also holds
    those of config.json when generation_config.json names none.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None
    eos_token_ids: tuple[int, ...] = ()


def read_generation_config(directory: Path) -> GenerationDefaults:
    """Defaults of the model in `directory`; all None where neither file says anything.

    Raises CheckpointError naming the file, the key and the value for a damaged file or a value out of
    range.
    """
    path, config_path = directory / "generation_config.json", directory / "config.json"
    advice = read_json_object(path, cap=MAX_BYTES) if path.is_file() else {}
    config = read_json_object(config_path) if config_path.is_file() else {}
    nested = config.get("text_config")
    text_config = nested if isinstance(nested, dict) else {}
    values = {name: _number(path, name, advice.get(name)) for name in _RANGES}
    sample = advice.get("do_sample")
    if sample is not None and not isinstance(sample, bool):
        raise _refuse(path, "do_sample", sample, "true or false")
    if sample is False:
        values["temperature"] = 0.0
    places = ((advice, path), (config, config_path), (text_config, config_path))
    ends = [_ids(source, "eos_token_id", file) for source, file in places]
    return GenerationDefaults(
        **values,
        eos_token_ids=next((ids for ids in ends if ids), ()),
    )


def _number(path: Path, name: str, value: Any) -> Any:
    if value is None:
        return None
    low, high, whole, above = _RANGES[name]
    allowed = f"a {'whole ' if whole else ''}number in {'(' if above else '['}{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        raise _refuse(path, name, value, allowed)
    if not math.isfinite(value) or not low <= value <= high or (above and value == low):
        raise _refuse(path, name, value, allowed)
    return value if whole else float(value)


def _ids(source: Mapping[str, Any], name: str, path: Path) -> tuple[int, ...]:
    value = source.get(name)
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(type(item) is int and 0 <= item < 2**31 for item in ids):
        raise _refuse(path, name, value, "a token id >= 0 or a list of them")
    return tuple(dict.fromkeys(ids))


def _refuse(path: Path, name: str, value: Any, allowed: str) -> CheckpointError:
    return CheckpointError(f"{path}: {name} is {value!r}, allowed is {allowed}; correct or remove it")
