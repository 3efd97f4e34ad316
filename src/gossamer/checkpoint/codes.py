"""Quantized matrices as the integers they are stored in, so that they are served bit for bit as written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer.errors import CheckpointError
from gossamer.graph.ops.formats import NF4

__all__ = ["CodedTensor", "Codes", "Floats", "Scattered", "joined"]

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Codes:
    """Rows of a matrix [n, k]; format and group as in `gossamer.graph.ir.Weight`.

    codes [n, k] int8: the integer of int8 (-128 .. 127) and int4 (-8 .. 7), q of uint4 (0 .. 15), the index
    of the level of nf4 (0 .. 15). scales [n, groups] float32 (one group where group is 0), exact in fp16
    where there are groups. zeros [n, groups] uint8, of uint4 alone.
    A value is scale * code, scale * (code - zero) of uint4, scale * NF4[code] of nf4.
    """

    format: str
    group: int
    codes: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float32]
    zeros: npt.NDArray[np.uint8] | None = None

    def rows(self, start: int, stop: int) -> Codes:
        """Rows [start, stop)."""
        return replace(
            self,
            codes=self.codes[start:stop],
            scales=self.scales[start:stop],
            zeros=None if self.zeros is None else self.zeros[start:stop],
        )

    def floats(self) -> npt.NDArray[np.float32]:
        """The values [n, k]."""
        k = self.codes.shape[1]
        values = self.codes.astype(np.float32)
        if self.format == "nf4":
            values = np.asarray(NF4, np.float32)[self.codes]
        if self.zeros is not None:
            values -= _spread(self.zeros.astype(np.float32), self.group, k)
        values *= _spread(self.scales, self.group, k)
        return values


@dataclass(frozen=True, slots=True, kw_only=True)
class CodedTensor:
    """A matrix [n, k] for a quantized checkpoint that exists only while it is written.

    format, group: as of the `Codes` [n, k] that `make` gives, whenever it is called, the same each time.
    activation_scale: the one scale of its inputs, float32 (of int8 without groups alone); None where every
    token has its own.
    """

    format: str
    group: int
    shape: tuple[int, int]
    make: Callable[[], Codes]
    activation_scale: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scattered:
    """A quantized matrix whose groups are not of neighbouring inputs: its integers stand in the order that
    makes them so. Column i multiplies input order[i]."""

    format: str
    group: int
    order: tuple[int, ...]


class Floats:
    """What a `WeightSource` of nothing but floats says of codes: base class of those."""

    def stored(self, name: str) -> tuple[str, int]:
        """Floats, whatever their width."""
        return "f32", 0

    def read_codes(self, name: str, start: int, stop: int) -> Codes:
        """There are none. Raises CheckpointError."""
        raise CheckpointError(f"tensor {name!r} is of floats and has no codes")

    def scattered(self, name: str) -> Scattered | None:
        """None is."""
        return None

    def activation_scale(self, name: str) -> float:
        """There is none."""
        return 0.0

    def nonzeros(self, name: str) -> int | None:
        """Nothing is declared: zeros are counted where that matters."""
        return None


def joined(parts: Sequence[Codes]) -> Codes:
    """Rows of several matrices one after the other. Raises CheckpointError where they differ in format."""
    first = parts[0]
    for part in parts[1:]:
        if (part.format, part.group) != (first.format, first.group):
            raise CheckpointError(
                f"tensors in {first.format} (group {first.group}) and {part.format} (group {part.group}) "
                "form one matrix, which must have one format"
            )
    return replace(
        first,
        codes=np.concatenate([p.codes for p in parts]),
        scales=np.concatenate([p.scales for p in parts]),
        zeros=None
        if first.zeros is None
        else np.concatenate([p.zeros for p in parts if p.zeros is not None]),
    )


def _spread(per_group: Array, group: int, k: int) -> Array:
    return np.repeat(per_group, group, axis=1)[:, :k] if group else per_group
