"""The container of GGUF, read without trusting a byte of it.

Layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian): magic,
version, counts; typed key-value pairs; name, extents (the fastest first), type and offset of every tensor;
then, aligned, the data.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gossamer.checkpoint.gguf_blocks import BLOCKS, NAMES, Block
from gossamer.checkpoint.safetensors import short
from gossamer.errors import CheckpointError

__all__ = ["ALIGNMENT", "VALUE_TYPES", "GGUFFile", "GGUFTensor"]

ALIGNMENT = 32
MAGIC = b"GGUF"
# Number of the type -> struct's letter. 7 is bool, 8 a string, 9 an array.
VALUE_TYPES: Mapping[int, str] = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
STRING, ARRAY = 8, 9
_MAX_KEYS, _MAX_TENSORS, _MAX_KEY, _MAX_NAME = 65_535, 1_000_000, 65_535, 64
_DEEPEST = 4  # arrays in arrays
_RENEW = "the file is damaged or hostile: download or convert it again"


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Where a tensor lies. shape: the slowest extent first, as everywhere here; start, stop: byte range
    within the file."""

    name: str
    block: Block
    shape: tuple[int, ...]
    start: int
    stop: int


class GGUFFile:
    """One memory-mapped GGUF file; all of its header is checked before anything is served.

    metadata: key -> number, bool, string or list; tensors: by name. Raises CheckpointError naming file, key
    or tensor and value for whatever the format forbids.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                if self.size < 24:
                    raise self._refuse(f"it has {self.size} bytes, too few for a header")
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as cause:
            raise CheckpointError(
                f"cannot read {self.path}: {cause.strerror or cause}; check the path or download it again"
            ) from None
        self._at = 0
        tensors, keys = self._read_counts()
        self.metadata: dict[str, Any] = {}
        for _ in range(keys):
            self._read_pair()
        self.alignment = self._check_alignment()
        entries = [self._read_entry() for _ in range(tensors)]
        self.header_size = self._at
        self.tensors = self._place(entries)

    def _refuse(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {problem}; {_RENEW}")

    def _take(self, count: int, what: str) -> bytes:
        """The next bytes."""
        if count > self.size - self._at:
            raise self._refuse(
                f"{short(what)} takes {short(count)} bytes at {self._at}, and {self.size - self._at} are left"
            )
        self._at += count
        return self.map[self._at - count : self._at]

    def _whole(self, what: str, width: int = 8) -> int:
        return int.from_bytes(self._take(width, what), "little")

    def _string(self, what: str, most: int | None = None) -> str:
        length = self._whole(what)
        if most is not None and length > most:
            raise self._refuse(f"{short(what)} has {short(length)} bytes, above the {most} allowed")
        try:
            return self._take(length, what).decode("utf-8")
        except UnicodeDecodeError as cause:
            raise self._refuse(f"{short(what)} is not UTF-8 (byte {cause.start})") from None

    def _read_counts(self) -> tuple[int, int]:
        magic, version = self._take(4, "magic"), self._whole("version", 4)
        if magic != MAGIC:
            raise self._refuse(f"it begins with {magic!r}, not with {MAGIC!r}")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3)
            hint = " (it is of a big-endian machine)" if swapped else ""
            raise CheckpointError(
                f"{self.path} is GGUF version {version}{hint}; versions 2 and 3, little-endian, are read: "
                "convert it again"
            )
        tensors, keys = self._whole("number of tensors"), self._whole("number of keys")
        if tensors > _MAX_TENSORS or keys > _MAX_KEYS:
            raise self._refuse(
                f"it claims {short(tensors)} tensors and {short(keys)} keys, above the {_MAX_TENSORS} and "
                f"{_MAX_KEYS} allowed"
            )
        return tensors, keys

    def _read_pair(self) -> None:
        key = self._string("a key", _MAX_KEY)
        if not key or key in self.metadata:
            raise self._refuse(f"the key {short(key)} is {'there twice' if key else 'empty'}")
        self.metadata[key] = self._value(key, self._whole(key, 4))

    def _value(self, key: str, kind: int, depth: int = 0) -> Any:
        if kind == STRING:
            return self._string(key)
        if kind == ARRAY:
            if depth == _DEEPEST:
                raise self._refuse(f"key {short(key)} nests arrays deeper than {_DEEPEST}")
            return self._array(key, self._whole(key, 4), self._whole(key), depth)
        return self._numbers(key, kind, 1)[0]

    def _numbers(self, key: str, kind: int, count: int) -> list[Any]:
        letter = VALUE_TYPES.get(kind)
        if letter is None:
            raise self._refuse(f"key {short(key)} has a value of the unknown type {kind}")
        width = struct.calcsize(f"<{letter}")
        data = self._take(count * width, key)
        if letter == "?" and data.strip(b"\0\1"):
            raise self._refuse(f"key {short(key)} is a bool that is neither 0 nor 1")
        return list(struct.unpack(f"<{count}{letter}", data))

    def _array(self, key: str, kind: int, count: int, depth: int) -> list[Any]:
        if kind in VALUE_TYPES:
            return self._numbers(key, kind, count)
        least = 12 if kind == ARRAY else 8  # bytes of an entry
        if count * least > self.size - self._at:
            raise self._refuse(f"key {short(key)} claims {short(count)} entries, more than the file can hold")
        if kind != STRING:
            return [self._value(key, kind, depth + 1) for _ in range(count)]
        return self._strings(key, count)

    def _strings(self, key: str, count: int) -> list[str]:
        """As `_string`, for vocabularies: a call for each would take as long again."""
        found, at, data, size = [], self._at, self.map, self.size
        for _ in range(count):
            stop = at + 8
            stop += int.from_bytes(data[at:stop], "little")
            if stop > size:
                raise self._refuse(f"key {short(key)} has an entry that ends at {short(stop)} of {size}")
            try:
                found.append(data[at + 8 : stop].decode("utf-8"))
            except UnicodeDecodeError:
                raise self._refuse(
                    f"entry {len(found)} of key {short(key)} is not UTF-8: {short(data[at + 8 : stop])}"
                ) from None
            at = stop
        self._at = at
        return found

    def _check_alignment(self) -> int:
        value = self.metadata.get("general.alignment", ALIGNMENT)
        if type(value) is not int or not 8 <= value <= 1 << 20 or value & (value - 1):
            raise self._refuse(
                f"general.alignment is {short(value)}; a power of two from 8 to {1 << 20} is right"
            )
        return value

    def _read_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string("a tensor's name", _MAX_NAME)
        dims = self._whole(name, 4)
        if not 1 <= dims <= 4:
            raise self._refuse(f"tensor {name!r} has {dims} extents; 1 to 4 are right")
        shape = struct.unpack(f"<{dims}Q", self._take(8 * dims, name))[::-1]
        return name, shape, self._whole(name, 4), self._whole(name)

    def _place(self, entries: list[tuple[str, tuple[int, ...], int, int]]) -> dict[str, GGUFTensor]:
        """Every tensor lies aligned within the file, and no byte belongs to two."""
        base = -(-self._at // self.alignment) * self.alignment
        found: dict[str, GGUFTensor] = {}
        for name, shape, kind, offset in entries:
            if name in found:
                raise self._refuse(f"tensor {name!r} is there twice")
            block = BLOCKS.get(kind)
            if block is None:
                raise CheckpointError(
                    f"{self.path}: tensor {name!r} is stored as {NAMES.get(kind, f'type {kind}')}, which is "
                    f"not read; read are {', '.join(b.name for b in BLOCKS.values())}: take the model in "
                    "one of these"
                )
            if min(shape) < 1 or shape[-1] % block.size:
                raise self._refuse(
                    f"tensor {name!r} has shape {short(shape)}; extents from 1 and rows in whole blocks of "
                    f"{block.size} ({block.name}) are right"
                )
            start = base + offset
            stop = start + math.prod(shape) // block.size * block.bytes
            if offset % self.alignment or stop > self.size:
                raise self._refuse(
                    f"tensor {name!r} lies at {short(offset)} and ends at {short(stop)} of {self.size}; "
                    f"offsets are multiples of {self.alignment} and within the file"
                )
            found[name] = GGUFTensor(name, block, shape, start, stop)
        at, before = base, "the header"
        for tensor in sorted(found.values(), key=lambda t: t.start):
            if tensor.start < at:
                raise self._refuse(f"tensor {tensor.name!r} overlaps {before}")
            at, before = tensor.stop, f"tensor {tensor.name!r}"
        return found
