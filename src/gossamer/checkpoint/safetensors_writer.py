"""Writing safetensors: streaming, aligned, all or nothing. The format is described in `safetensors.py`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gossamer.checkpoint.safetensors import DTYPES, element_count
from gossamer.errors import CheckpointError

__all__ = ["LazyTensor", "write_safetensors"]


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor for `write_safetensors` that exists only while it is written.

    dtype: safetensors' name; make: gives the array, whose dtype and shape must be these.
    """

    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray[Any, Any]]


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray[Any, Any] | LazyTensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file, one tensor in memory at a time, aside and then renamed: all or nothing.

    Larger dtypes come first, so that every tensor is aligned. Raises CheckpointError for a dtype the
    format lacks, a reserved name, or a LazyTensor that makes something else than it promised; OSError
    when the disk refuses.
    """
    path = Path(path)
    specs = {name: _spec(name, tensor) for name, tensor in tensors.items()}
    order = sorted(specs, key=lambda name: (-DTYPES[specs[name][0]].itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name in order:
        dtype, shape = specs[name]
        stop = at + element_count(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with aside.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                file.writelines(_chunks(_evaluate(name, tensors[name], specs[name])))
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _spec(name: str, tensor: np.ndarray[Any, Any] | LazyTensor) -> tuple[str, tuple[int, ...]]:
    if name == "__metadata__":
        raise CheckpointError("a tensor cannot be named '__metadata__': the format reserves it; rename it")
    if isinstance(tensor, LazyTensor):
        known = tensor.dtype if tensor.dtype in DTYPES else None
    else:
        native = tensor.dtype.newbyteorder("=")
        known = next((key for key, dtype in DTYPES.items() if dtype == native), None)
    if known is None:
        raise CheckpointError(
            f"tensor {name!r}: dtype {tensor.dtype} cannot be stored; allowed are {', '.join(DTYPES)}"
        )
    return known, tuple(tensor.shape)


def _evaluate(
    name: str, tensor: np.ndarray[Any, Any] | LazyTensor, spec: tuple[str, tuple[int, ...]]
) -> np.ndarray[Any, Any]:
    array = tensor.make() if isinstance(tensor, LazyTensor) else tensor
    dtype, shape = DTYPES[spec[0]], spec[1]
    if array.dtype.newbyteorder("=") != dtype or array.shape != shape:
        raise CheckpointError(
            f"tensor {name!r} was announced as {dtype} {shape} but came as {array.dtype} {array.shape}"
        )
    return np.ascontiguousarray(array, dtype)


def _chunks(array: np.ndarray[Any, Any], size: int = 16 << 20) -> Iterator[memoryview]:
    flat = array.reshape(-1).view(np.uint8).data
    return (flat[at : at + size] for at in range(0, len(flat), size))
