"""Writing a model's directory: weights in shards, config.json, and what lies beside them in the old one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer.checkpoint.safetensors import DTYPES, INDEX, SINGLE, element_count
from gossamer.checkpoint.safetensors_writer import LazyTensor, write_safetensors
from gossamer.checkpoint.weights import ModelSource

__all__ = ["copy_beside", "from_checkpoint", "write_config", "write_weights"]

Tensors = Mapping[str, npt.NDArray[Any] | LazyTensor]
_SHARD = 4 << 30  # bytes
_BESIDE = (
    "generation_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
    "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja", "LICENSE",
)  # fmt: skip
"""What a model needs beside weights and config.json, whatever is done to its numbers."""


def from_checkpoint(source: ModelSource, names: list[str] | None = None) -> dict[str, LazyTensor]:
    """Tensors as they lie in a checkpoint (all of them, or those named), read when they are written."""

    def read(name: str) -> npt.NDArray[Any]:
        array = source.read(name)
        source.release(name)
        return array

    infos = {name: source.info(name) for name in (source.names() if names is None else names)}
    return {
        name: LazyTensor(info.dtype, info.shape, lambda name=name: read(name))  # type: ignore[misc]
        for name, info in infos.items()
    }


def write_weights(directory: Path, tensors: Tensors, *, shard: int = _SHARD) -> int:
    """model.safetensors, or shards of at most `shard` bytes with their index; gives the bytes of all tensors.

    Raises CheckpointError, OSError (a full disk) as `write_safetensors` does.
    """
    sizes = {name: _size(tensor) for name, tensor in tensors.items()}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    total = sum(sizes.values())
    if len(shards) == 1:
        write_safetensors(directory / SINGLE, tensors, {"format": "pt"})
        return total
    places: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(directory / file, {name: tensors[name] for name in names}, {"format": "pt"})
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    write_json(directory / INDEX, index)
    return total


def write_config(directory: Path, config: Mapping[str, Any]) -> None:
    """config.json."""
    write_json(directory / "config.json", config)


def copy_beside(source: Path, directory: Path) -> None:
    """Tokenizer, chat template, generation settings and licence of one model's directory into another."""
    for name in _BESIDE:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def write_json(path: Path, value: Any) -> None:
    """A JSON file, aside and then renamed."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        aside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _size(tensor: npt.NDArray[Any] | LazyTensor) -> int:
    itemsize = (
        DTYPES[tensor.dtype].itemsize if isinstance(tensor, LazyTensor) else np.dtype(tensor.dtype).itemsize
    )
    return element_count(tensor.shape) * itemsize
