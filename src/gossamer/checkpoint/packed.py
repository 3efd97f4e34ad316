"""Quantized checkpoints: what all their formats share.

A matrix that several tensors of the file make up is one tensor under the name that families know, and gives
its integers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import numpy as np
import numpy.typing as npt

from gossamer.checkpoint.codes import Codes, Scattered
from gossamer.checkpoint.safetensors import TensorInfo
from gossamer.errors import CheckpointError, UnsupportedModelError
from gossamer.graph.families.fields import Fields

__all__ = [
    "FLOATS", "ROUNDED", "Packed", "PackedCheckpoint", "Settings", "TensorFile", "expect", "half",
    "kernel_format", "spread", "unpack",
]  # fmt: skip

Array = npt.NDArray[Any]
FLOATS = ("F16", "BF16", "F32")
ROUNDED = (
    "scales of groups are rounded to fp16, by at most 1/2048 of each (or 3e-8); integers stay as they are"
)


class TensorFile(Protocol):
    """Tensors as they lie on disk: `Checkpoint`, or what unpacks a part of it."""

    def names(self) -> list[str]:
        """Of all tensors."""

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor of that name."""

    def info(self, name: str) -> TensorInfo:
        """dtype, shape and place."""

    def read(self, name: str) -> Array:
        """A whole tensor."""

    def read_rows(self, name: str, start: int, stop: int) -> Array:
        """Rows [start, stop) along the first axis."""

    def release(self, name: str) -> None:
        """Says that it will not be read again soon."""

    def content_key(self) -> str:
        """Changes whenever a tensor's bytes do."""

    def nonzeros(self, name: str) -> int | None:
        """How many numbers are not zero, at most; None where nothing declares it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """A matrix [n, k] of several tensors.

    parts: their names; format, group: how kernels hold it; codes(start, stop): its rows; activation_scale: of
    its inputs, 0 where every token has its own; order: None, or which input each column
    of the codes multiplies.
    """

    shape: tuple[int, int]
    format: str
    group: int
    parts: tuple[str, ...]
    codes: Callable[[int, int], Codes]
    activation_scale: float = 0.0
    order: tuple[int, ...] | None = None


class PackedCheckpoint:
    """A checkpoint some of whose matrices are quantized, as a `WeightSource`.

    notes: what reading changes or leaves out, in sentences, for the user to see.
    """

    def __init__(
        self,
        file: TensorFile,
        settings: Mapping[str, Any],
        matrices: Mapping[str, Packed],
        *,
        aside: Iterable[str] = (),
        notes: Iterable[str] = (),
    ) -> None:
        """settings: quantization_config; aside: tensors that are neither read nor missed."""
        self._file, self._matrices = file, dict(matrices)
        self._settings = json.dumps(settings, sort_keys=True, default=str)
        hidden = {part for matrix in matrices.values() for part in matrix.parts} | set(aside)
        self._plain = [name for name in file.names() if name not in hidden]
        self.notes = tuple(dict.fromkeys(notes))

    def names(self) -> list[str]:
        """Of all tensors, matrices under the names that they have unquantized."""
        return [*self._plain, *self._matrices]

    def info(self, name: str) -> TensorInfo:
        """As of the file; of a matrix its own shape, float32, and the place of its integers."""
        if name not in self._matrices:
            return self._file.info(name)
        matrix = self._matrices[name]
        first = self._file.info(matrix.parts[0])
        return TensorInfo("F32", matrix.shape, first.start, first.stop)

    def read(self, name: str) -> Array:
        """The tensor, float32 where it is quantized."""
        if name in self._matrices:
            return self.read_rows(name, 0, self._matrices[name].shape[0])
        return self._file.read(name)

    def read_rows(self, name: str, start: int, stop: int) -> Array:
        """Rows [start, stop) of it."""
        if name in self._matrices:
            floats = self.read_codes(name, start, stop).floats()
            order = self._matrices[name].order
            return floats if order is None else floats[:, np.argsort(order)]
        return self._file.read_rows(name, start, stop)

    def release(self, name: str) -> None:
        """Of all its parts."""
        for part in self._matrices[name].parts if name in self._matrices else (name,):
            self._file.release(part)

    def content_key(self) -> str:
        """Of the file and of what its integers mean."""
        return hashlib.blake2b(
            f"{self._file.content_key()}\0{self._settings}".encode(), digest_size=16
        ).hexdigest()

    def stored(self, name: str) -> tuple[str, int]:
        """Format and group of a matrix."""
        matrix = self._matrices.get(name)
        return ("f32", 0) if matrix is None or matrix.order is not None else (matrix.format, matrix.group)

    def scattered(self, name: str) -> Scattered | None:
        """Format, group and order of a matrix whose groups are not of neighbours."""
        matrix = self._matrices.get(name)
        if matrix is None or matrix.order is None:
            return None
        return Scattered(format=matrix.format, group=matrix.group, order=matrix.order)

    def activation_scale(self, name: str) -> float:
        """The one scale of a matrix's int8 inputs; 0 where every token has its own."""
        matrix = self._matrices.get(name)
        return 0.0 if matrix is None else matrix.activation_scale

    def nonzeros(self, name: str) -> int | None:
        """As the file declares them, of a matrix those of its integers."""
        return self._file.nonzeros(self._matrices[name].parts[0] if name in self._matrices else name)

    def read_codes(self, name: str, start: int, stop: int) -> Codes:
        """Rows of a matrix. Raises CheckpointError for what is none, or damaged."""
        if name not in self._matrices:
            raise CheckpointError(f"tensor {name!r} is of floats and has no codes")
        matrix = self._matrices[name]
        if not 0 <= start <= stop <= matrix.shape[0]:
            raise CheckpointError(f"rows {start}..{stop} of {name!r}, whose shape is {matrix.shape}")
        codes = matrix.codes(start, stop)
        if not np.isfinite(codes.scales).all():
            raise CheckpointError(f"tensor {name!r}: a scale is NaN or infinite; the checkpoint is damaged")
        return codes


class Settings:
    """quantization_config being read: what is not understood is refused, as of all of config.json.

    Messages and --ignore-config-field know its fields as quantization_config.NAME.
    """

    _PREFIX = "quantization_config."

    def __init__(self, settings: Mapping[str, Any], ignore: Collection[str] = ()) -> None:
        self.fields = Fields({self._PREFIX + name: value for name, value in settings.items()}, ignore)

    def raw(self, name: str) -> Any:
        """The value as it stands; None where absent."""
        return self.fields.raw(self._PREFIX + name)

    def whole(self, name: str, default: int | None = None, *, least: int = 0) -> int:
        """A whole number."""
        return self.fields.whole(self._PREFIX + name, default, least=least)

    def flag(self, name: str, default: bool = False) -> bool:
        """true or false."""
        return self.fields.flag(self._PREFIX + name, default)

    def choice(self, name: str, default: Any, allowed: Collection[Any], instead: str) -> Any:
        """One of the values allowed; instead: what else would work."""
        value = self.raw(name)
        value = default if value is None else value
        if value not in allowed:
            self.refuse(name, value, f"{' or '.join(map(repr, allowed))} can be read; {instead}")
        return value

    def names(self, name: str) -> list[str]:
        """A list of text; empty where absent."""
        value = self.raw(name) or []
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            self.refuse(name, value, "a list of names is right")
        return list(value)

    def refuse(self, name: str, value: Any, right: str) -> NoReturn:
        """Raises UnsupportedModelError."""
        raise UnsupportedModelError(f"config.json: {self._PREFIX}{name} is {value!r}: {right}")

    def finish(self, *inert: str) -> None:
        """Raises UnsupportedModelError naming fields that were neither read nor inert."""
        self.fields.finish(*(self._PREFIX + name for name in inert))


def expect(file: TensorFile, name: str, dtypes: Collection[str], *shapes: tuple[int, ...], of: str) -> str:
    """The name, of a tensor that is there, with one of these dtypes and, where given, shapes.

    of: what needs it. Raises CheckpointError.
    """
    if name not in file:
        raise CheckpointError(
            f"tensor {name!r} is missing, without which {of!r} cannot be read; download the model again"
        )
    info = file.info(name)
    if info.dtype not in dtypes or (shapes and info.shape not in shapes):
        right = f"{' or '.join(dtypes)} {shapes[0] if shapes else ''}".rstrip()
        raise CheckpointError(
            f"tensor {name!r} is {info.dtype} {info.shape}; {right} is right for {of!r}: download it again"
        )
    return name


def kernel_format(name: str, bits: int, symmetric: bool, group: int, k: int) -> tuple[str, int]:
    """The format and group that hold such codes unchanged; group 0: a scale for each row [k].

    Scales of larger groups are repeated; 4 bits in groups of 16 are held in 8. Raises UnsupportedModelError.
    """
    if bits == 8 and symmetric and not group:
        return "int8", 0
    fitting = [g for g in (128, 64, 32) if (group or k) % g == 0] or ([32] if not group else [])
    if bits == 4 and fitting:
        return ("int4" if symmetric else "uint4"), fitting[0]
    small = [g for g in (32, 16) if group and group % g == 0]
    if bits in (4, 8) and symmetric and small:
        return "int8", small[0]
    raise UnsupportedModelError(
        f"tensor {name!r} has {bits} bits, {'symmetric' if symmetric else 'with zero points'}, "
        f"{f'in groups of {group}' if group else 'with one scale per row'}, which no kernel holds; 4 bits in "
        "groups of 32 or a multiple and 8 bits without zero points would work: take or make such a "
        "checkpoint (gossamer compress), or the unquantized model with --quantization"
    )


def gathered(file: TensorFile, g_idx: str, group: int, groups: int) -> npt.NDArray[np.int64] | None:
    """The order of inputs in which the groups that a g_idx scatters are of neighbours; None where they are.

    Raises CheckpointError where a group has not the inputs that it should."""
    of_input = file.read(g_idx).astype(np.int64)
    counts = np.bincount(of_input[(of_input >= 0) & (of_input < groups)], minlength=groups)
    if counts.sum() != of_input.size or (counts[:-1] != group).any() or counts[-1] > group:
        raise CheckpointError(
            f"tensor {g_idx!r} does not give every group its {group} inputs; download the model again"
        )
    order = np.argsort(of_input, kind="stable")
    return None if np.array_equal(order, np.arange(order.size)) else order


def spread(per_group: Array, group: int, k: int, kernel_group: int) -> Array:
    """Scales or zero points [n, groups of the file] for the kernel's groups; 0: a whole row."""
    if not kernel_group:
        return per_group
    of = np.arange(0, k, kernel_group) // (group or k)
    return per_group[:, of]


def half(name: str, scales: Array) -> npt.NDArray[np.float32]:
    """Scales as float32 that fp16 holds, the nearest. Raises CheckpointError for one beyond its range."""
    wide = np.ascontiguousarray(scales, np.float32)
    with np.errstate(over="ignore"):
        rounded = wide.astype(np.float16).astype(np.float32)
    far = np.isfinite(wide) & ~np.isfinite(rounded)
    if far.any():
        raise CheckpointError(
            f"tensor {name!r}: scale {wide[far][0]:g} is beyond 65504, the most that fp16 holds, as which "
            "kernels keep it; take the unquantized model with --quantization"
        )
    return rounded


def unpack(words: npt.NDArray[np.int32], bits: int) -> npt.NDArray[np.uint8]:
    """Unsigned integers [n, w * 32 / bits] of int32 words [n, w], the first in the lowest bits.

    bits: 4 or 8.
    """
    octets = np.ascontiguousarray(words, "<i4").view(np.uint8)
    if bits == 8:
        return octets
    out = np.empty((octets.shape[0], octets.shape[1] * 2), np.uint8)
    out[:, 0::2] = octets & 15
    out[:, 1::2] = octets >> 4
    return out
