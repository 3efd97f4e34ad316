"""Sparse tensors of compressed-tensors, unpacked as they are read.

Layout (https://github.com/vllm-project/compressed-tensors, up to release 0.14, the last to write it): tensor
"x" [n, k] is x.bitmask [n, ceil(k/8)] uint8, bit j of a row (the lowest first) set where there is
a value; x.shape [2]; and the values in order, as x.compressed [values] with the place of each row's first in
x.row_offsets [n] ("sparse-bitmask"), or as x.compressed [n, k/2] ("sparse-24-bitmask").
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer.checkpoint.packed import Settings, TensorFile
from gossamer.checkpoint.safetensors import DTYPES, TensorInfo, element_count
from gossamer.errors import CheckpointError

__all__ = ["BitmaskFile", "open_bitmask", "packed_bits"]

Array = npt.NDArray[Any]
_FORMATS = ("dense", "sparse-bitmask", "sparse-24-bitmask")
_PARTS = ("compressed", "bitmask", "shape", "row_offsets")


def open_bitmask(file: TensorFile, sparsity: Mapping[str, Any], settings: Settings) -> TensorFile:
    """The file with its sparse tensors dense. sparsity: sparsity_config.

    Raises UnsupportedModelError for other formats, CheckpointError for parts that do not fit together.
    """
    read = Settings({f"sparsity_config.{key}": value for key, value in sparsity.items()})
    format = read.choice("sparsity_config.format", "dense", _FORMATS, "the dense model would work")
    names = ("targets", "ignore", "global_sparsity", "sparsity_structure", "registry_requires_subclass")
    read.finish(*(f"sparsity_config.{name}" for name in names))
    return file if format == "dense" else BitmaskFile(file)


def packed_bits(mask_NK: Array) -> npt.NDArray[np.uint8]:
    """A mask [n, k] as the format has it, [n, ceil(k/8)]."""
    return np.packbits(mask_NK, axis=1, bitorder="little")


class BitmaskFile:
    """Tensors of a file, those with a bitmask dense."""

    def __init__(self, file: TensorFile) -> None:
        self._file = file
        bases = [n.removesuffix(".bitmask") for n in file.names() if n.endswith(".bitmask")]
        self._sparse = {name: self._check(name) for name in bases}
        self._hidden = {f"{name}.{part}" for name in bases for part in _PARTS}

    def names(self) -> list[str]:
        """Of all tensors."""
        return [*(n for n in self._file.names() if n not in self._hidden), *self._sparse]

    def __contains__(self, name: object) -> bool:
        return name in self._sparse or (name in self._file and name not in self._hidden)

    def info(self, name: str) -> TensorInfo:
        """As of the file; of a sparse tensor its dense shape, and dtype and place of its values."""
        return self._sparse[name] if name in self._sparse else self._file.info(name)

    def nonzeros(self, name: str) -> int | None:
        """The values that a sparse tensor stores."""
        if name not in self._sparse:
            return self._file.nonzeros(name)
        return element_count(self._file.info(f"{name}.compressed").shape)

    def read(self, name: str) -> Array:
        """The tensor."""
        return (
            self.read_rows(name, 0, self.info(name).shape[0])
            if name in self._sparse
            else self._file.read(name)
        )

    def read_rows(self, name: str, start: int, stop: int) -> Array:
        """Rows [start, stop) of it. Raises CheckpointError where its parts disagree."""
        if name not in self._sparse:
            return self._file.read_rows(name, start, stop)
        info = self._sparse[name]
        n, k = info.shape
        if not 0 <= start <= stop <= n:
            raise CheckpointError(f"rows {start}..{stop} of {name!r}, whose shape is {info.shape}")
        bits = self._file.read_rows(f"{name}.bitmask", start, stop)
        mask = np.unpackbits(bits, axis=1, count=k, bitorder="little").view(np.bool_)
        values, count = self._file.read(f"{name}.compressed"), int(mask.sum())
        if values.ndim == 2:
            kept = values[start:stop].reshape(-1)
        else:
            before = self._before(name, start)
            kept = values[before : before + count]
        if kept.size != count or (values.ndim == 1 and stop == n and before + count != values.size):
            raise CheckpointError(
                f"tensor {name + '.bitmask'!r} marks {count} values in rows {start}..{stop}, and "
                f"{name + '.compressed'!r} has {kept.size}; download the model again"
            )
        out = np.zeros(mask.shape, DTYPES[info.dtype])
        out[mask] = kept
        return out

    def release(self, name: str) -> None:
        """Of all its parts."""
        parts = [f"{name}.{part}" for part in _PARTS] if name in self._sparse else [name]
        for part in parts:
            if part in self._file:
                self._file.release(part)

    def content_key(self) -> str:
        """Of the file, whose names say which tensors are sparse."""
        return self._file.content_key()

    def _before(self, name: str, row: int) -> int:
        offsets = f"{name}.row_offsets"
        if offsets in self._file:
            return int(self._file.read(offsets).reshape(-1)[row]) if row < self.info(name).shape[0] else 0
        above = self._file.read_rows(f"{name}.bitmask", 0, row)
        return int(np.unpackbits(above, axis=1, count=self.info(name).shape[1], bitorder="little").sum())

    def _check(self, name: str) -> TensorInfo:
        for part in ("compressed", "shape"):
            if f"{name}.{part}" not in self._file:
                raise CheckpointError(
                    f"tensor {f'{name}.{part}'!r} is missing, without which {name!r} cannot be read"
                )
        shape = tuple(int(v) for v in self._file.read(f"{name}.shape").reshape(-1)[:3])
        mask, values = self._file.info(f"{name}.bitmask"), self._file.info(f"{name}.compressed")
        fits = len(shape) == 2 and min(shape) > 0 and mask.dtype == "U8"
        if not fits or mask.shape != (shape[0], -(-shape[1] // 8)):
            raise CheckpointError(
                f"tensor {name + '.bitmask'!r} is {mask.dtype} {mask.shape}, and its shape says {shape}"
            )
        offsets = f"{name}.row_offsets"
        if offsets in self._file and self._file.info(offsets).shape not in ((shape[0],), (shape[0], 1)):
            raise CheckpointError(
                f"tensor {offsets!r} has shape {self._file.info(offsets).shape} for {shape[0]} rows"
            )
        if len(values.shape) == 2 and values.shape != (shape[0], shape[1] // 2):
            raise CheckpointError(
                f"tensor {name + '.compressed'!r} has shape {values.shape}, and half of {shape} is right"
            )
        return TensorInfo(values.dtype, shape, values.start, values.stop)
