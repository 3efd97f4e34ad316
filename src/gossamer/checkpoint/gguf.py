"""The tensors of a GGUF file under transformers' names; what llama.cpp's converter did to them is undone."""

from __future__ import annotations

import hashlib
import mmap
from collections import Counter
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer.checkpoint.codes import Codes, Floats
from gossamer.checkpoint.gguf_config import file_pieces
from gossamer.checkpoint.gguf_file import GGUFFile, GGUFTensor
from gossamer.checkpoint.gguf_names import Piece
from gossamer.checkpoint.safetensors import TensorInfo
from gossamer.errors import CheckpointError

__all__ = ["GGUFCheckpoint", "content_key", "turned_rows"]

Array = npt.NDArray[Any]
_HASH_WHOLE, _SAMPLE = 64 << 20, 4096  # bytes
_SAMPLE_ROWS = 16


@dataclass(frozen=True, slots=True)
class _Place:
    """A tensor by its transformers' name: plane `index` of what the file holds."""

    tensor: GGUFTensor
    piece: Piece
    index: int

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """In the file, of this plane."""
        return self.tensor.shape[1:] if self.piece.stacked else self.tensor.shape

    @property
    def shape(self) -> tuple[int, ...]:
        """As transformers has it."""
        return self.stored_shape[::-1] if self.piece.transposed else self.stored_shape

    @property
    def has_codes(self) -> bool:
        """Whether its rows are integers that stay as they are."""
        block, piece = self.tensor.block, self.piece
        return block.size > 1 and len(self.shape) == 2 and not (piece.shift or piece.transposed)


class GGUFCheckpoint(Floats):
    """A GGUF file as a `WeightSource`: floats as stored, blocks dequantized to float32 or as integers.

    Q8_0, Q4_0 and Q5_0 are served to the bit. Q6_K keeps its codes and has scales rounded to fp16; Q4_1,
    Q5_1, Q4_K and Q5_K have an offset that the kernels lack and are rounded to int8 in groups of 32: `notes`
    says so.
    Raises CheckpointError for what is damaged, UnsupportedModelError for an architecture that is not known.
    """

    def __init__(self, path: str | Path) -> None:
        self._file = GGUFFile(path)
        self.path = self._file.path
        self._places: dict[str, _Place] = {}
        for name, piece in file_pieces(self._file).items():
            tensor = self._file.tensors[name]
            self._check(tensor, piece)
            for index, other in enumerate(piece.names):
                self._places[other] = _Place(tensor, piece, index)

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def info(self, name: str) -> TensorInfo:
        """Shape and the dtype that `read` gives. Raises CheckpointError for an unknown name."""
        place = self._place(name)
        block = place.tensor.block
        dtype = block.name if block.size == 1 and not place.piece.shift else "F32"
        return TensorInfo(dtype, place.shape, place.tensor.start, place.tensor.stop)

    def read(self, name: str) -> Array:
        """The whole tensor: in its dtype, float32 where it is stored in blocks."""
        place = self._place(name)
        if place.piece.transposed:
            return np.ascontiguousarray(self._floats(place, 0, place.stored_shape[0]).T)
        return self.read_rows(name, 0, place.shape[0])

    def read_rows(self, name: str, start: int, stop: int) -> Array:
        """Rows [start, stop) of the first axis. Raises CheckpointError out of range."""
        place = self._place(name)
        if not 0 <= start <= stop <= place.shape[0]:
            raise CheckpointError(
                f"{self.path}: rows {start}..{stop} of {name!r}, whose shape is {place.shape}"
            )
        if place.piece.transposed:
            return self.read(name)[start:stop]
        return self._floats(place, start, stop).reshape(stop - start, *place.shape[1:])

    def release(self, name: str) -> None:
        """Lets the kernel drop the tensor's pages from our memory; views stay valid and are read again."""
        tensor = self._place(name).tensor
        start = -(-tensor.start // mmap.PAGESIZE) * mmap.PAGESIZE
        stop = tensor.stop // mmap.PAGESIZE * mmap.PAGESIZE
        if stop > start and hasattr(mmap, "MADV_DONTNEED"):
            self._file.map.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def content_key(self) -> str:
        """32 hex digits that name the content, as `Checkpoint.content_key`."""
        return content_key(self._file)

    def stored(self, name: str) -> tuple[str, int]:
        """Format and group of a matrix stored in blocks; ("f32", 0) for floats."""
        place = self._place(name)
        return place.tensor.block.served if place.has_codes else ("f32", 0)

    def read_codes(self, name: str, start: int, stop: int) -> Codes:
        """Rows [start, stop) as integers. Raises CheckpointError for floats, and for scales that are not
        finite."""
        place = self._place(name)
        if not place.has_codes:
            raise CheckpointError(f"{self.path}: tensor {name!r} is of floats and has no codes")
        codes = place.tensor.block.read_codes(self._records(place, start, stop))
        if not np.isfinite(codes.scales).all():
            raise CheckpointError(
                f"{self.path}: tensor {name!r} has a scale that is not finite; the file is damaged: "
                "download it again"
            )
        return codes

    def notes(self) -> list[str]:
        """What is served otherwise than it is stored, a line for each type, with the relative error measured
        on rows of every matrix."""
        counts: Counter[str] = Counter()
        errors: dict[str, tuple[float, float]] = {}
        served: dict[str, tuple[str, int]] = {}
        for place in self._places.values():
            block = place.tensor.block
            if block.exact or not place.has_codes:
                continue
            rows = np.unique(np.linspace(0, place.shape[0] - 1, _SAMPLE_ROWS).astype(int))
            if counts[block.name] < 1000:  # thousands of experts would take long, and say no more
                records = np.concatenate([self._records(place, row, row + 1) for row in rows])
                with np.errstate(all="ignore"):
                    values = block.decode(records).astype(np.float64)
                    wrong = block.read_codes(records).floats() - values
                lost, whole = errors.get(block.name, (0.0, 0.0))
                errors[block.name] = (lost + float((wrong**2).sum()), whole + float((values**2).sum()))
            counts[block.name] += 1
            served[block.name] = block.served
        return [
            f"{self.path.name} stores {count} matri{'x' if count == 1 else 'ces'} as {kind}, served as "
            f"{served[kind][0]} in groups of {served[kind][1]}"
            f"{' with scales rounded to fp16' if kind == 'Q6_K' else ''}: relative error "
            f"{(errors[kind][0] / max(errors[kind][1], 1e-300)) ** 0.5:.2%}"
            for kind, count in counts.items()
        ]

    def _check(self, tensor: GGUFTensor, piece: Piece) -> None:
        experts = len(piece.names)
        if piece.stacked and (len(tensor.shape) != 3 or tensor.shape[0] != experts):
            raise CheckpointError(
                f"{self.path}: tensor {tensor.name!r} has shape {tensor.shape}; a matrix for each of "
                f"{experts} experts is right"
            )
        rows = tensor.shape[0]
        if piece.heads and rows % (2 * piece.heads):
            raise CheckpointError(
                f"{self.path}: tensor {tensor.name!r} has {rows} rows, which are not {piece.heads} heads of "
                "an even size"
            )
        if piece.transposed and len(tensor.shape) != 2:
            raise CheckpointError(
                f"{self.path}: tensor {tensor.name!r} has shape {tensor.shape}; two are right"
            )

    def _place(self, name: str) -> _Place:
        if name not in self._places:
            near = get_close_matches(name, self._places, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise CheckpointError(f"{self.path} has no tensor {name!r} among its {len(self._places)}{hint}")
        return self._places[name]

    def _records(self, place: _Place, start: int, stop: int) -> Array:
        """Rows [start, stop) of the stored plane [n, blocks], in transformers' order."""
        block, shape = place.tensor.block, place.stored_shape
        blocks = shape[-1] // block.size
        # A vector of the heads is as many rows of one number.
        height = shape[0] if len(shape) > 1 or place.piece.heads else 1
        blocks = blocks if len(shape) > 1 or not place.piece.heads else 1
        at = place.tensor.start + place.index * height * blocks * block.bytes
        rows = np.frombuffer(self._file.map, block.record, height * blocks, at).reshape(height, blocks)
        if place.piece.heads:
            return rows[turned_rows(height, place.piece.heads)[start:stop]]
        return rows[start:stop]

    def _floats(self, place: _Place, start: int, stop: int) -> Array:
        shape = place.stored_shape
        if len(shape) == 1 and not place.piece.heads:
            values = place.tensor.block.decode(self._records(place, 0, 1))[0, start:stop]
        else:
            values = place.tensor.block.decode(self._records(place, start, stop))
        if place.piece.shift:
            return values.astype(np.float32) - np.float32(place.piece.shift)
        if not values.flags.aligned:
            values = values.copy()
        values.flags.writeable = False
        return values


def turned_rows(rows: int, heads: int) -> npt.NDArray[np.int64]:
    """Where in GGUF transformers' rows lie: neighbours there are the halves of a head here (llama.cpp's
    convert_hf_to_gguf.py, LlamaModel.permute)."""
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


def content_key(file: GGUFFile) -> str:
    """32 hex digits: of the whole file up to 64 MB; of a larger one of its header, 3 x 4 KiB of every tensor
    and the time of its last change."""
    digest = hashlib.blake2b(f"gguf\0{file.size}\0".encode(), digest_size=16)
    if file.size <= _HASH_WHOLE:
        digest.update(file.map)
        return digest.hexdigest()
    digest.update(f"{file.path.stat().st_mtime_ns}\0".encode() + file.map[: file.header_size])
    for tensor in file.tensors.values():
        last = max(tensor.stop - _SAMPLE, tensor.start)
        for at in (tensor.start, (tensor.start + last) // 2, last):
            digest.update(file.map[at : min(at + _SAMPLE, tensor.stop)])
    return digest.hexdigest()
