"""Writing the container of GGUF: streaming, aligned, all or nothing. The format: `gguf_file.py`."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer.checkpoint.gguf_blocks import BY_NAME
from gossamer.checkpoint.gguf_file import ALIGNMENT, ARRAY, MAGIC, STRING, VALUE_TYPES
from gossamer.errors import CheckpointError

__all__ = ["LazyBlocks", "write_gguf_file"]

_VERSION = 3
_NUMBER = {letter: kind for kind, letter in VALUE_TYPES.items()}


@dataclass(frozen=True, slots=True)
class LazyBlocks:
    """A tensor that exists only while it is written. kind: the name of its type; shape: the slowest extent
    first; make: gives its bytes, piece by piece."""

    kind: str
    shape: tuple[int, ...]
    make: Callable[[], Iterator[npt.NDArray[Any]]]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        block = BY_NAME[self.kind][1]
        return math.prod(self.shape) // block.size * block.bytes


def write_gguf_file(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, LazyBlocks],
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Writes a GGUF file, aside and then renamed; gives its bytes. metadata: bool, int (uint32 where it
    fits), float (float32), str, and lists of one of them (ints as int32). progress: (bytes
    done, bytes in all).

    Raises CheckpointError for a tensor that makes other bytes than its shape says; OSError when the disk
    refuses.
    """
    header = [MAGIC, struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        header += [_text(key), _typed(value)]
    at = 0
    for name, tensor in tensors.items():
        header.append(_text(name) + struct.pack("<I", len(tensor.shape)))
        header.append(struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape[::-1]))
        header.append(struct.pack("<IQ", BY_NAME[tensor.kind][0], at))
        at += _aligned(tensor.nbytes)
    start = b"".join(header)
    start += bytes(_aligned(len(start)) - len(start))
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    done = 0
    try:
        with aside.open("wb") as file:
            file.write(start)
            for name, tensor in tensors.items():
                written = 0
                for piece in tensor.make():
                    data = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
                    file.write(data.data)
                    written += data.nbytes
                    if progress is not None:
                        progress(done + written, at)
                if written != tensor.nbytes:
                    raise CheckpointError(
                        f"tensor {name!r} was announced with {tensor.nbytes} bytes and came with {written}"
                    )
                file.write(bytes(_aligned(written) - written))
                done += _aligned(written)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return len(start) + at


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _typed(value: Any) -> bytes:
    if isinstance(value, list):
        texts = not value or isinstance(value[0], str)
        letter = "" if texts else {bool: "?", int: "i", float: "f"}[type(value[0])]
        head = struct.pack("<IIQ", ARRAY, _NUMBER[letter] if letter else STRING, len(value))
        return head + (
            struct.pack(f"<{len(value)}{letter}", *value) if letter else b"".join(map(_text, value))
        )
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value)
    letter = {bool: "?", float: "f"}.get(type(value)) or ("I" if 0 <= value < 2**32 else "q")
    return struct.pack(f"<I{letter}", _NUMBER[letter], value)
