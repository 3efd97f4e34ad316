"""Safetensors, read without trusting a byte of the header.

Layout (https://github.com/huggingface/safetensors, "Format"): 8 bytes little-endian header length,
a JSON header {name: {dtype, shape, data_offsets}}, then the data, without holes or overlaps.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gossamer.checkpoint.codes import Floats
from gossamer.checkpoint.json_file import parse_json_object, read_json_object
from gossamer.errors import CheckpointError

__all__ = ["DTYPES", "Checkpoint", "SafetensorsFile", "TensorInfo", "element_count"]

DTYPES: Mapping[str, np.dtype[Any]] = {
    name: np.dtype(kind)
    for name, kind in {
        "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
        "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
        "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
    }.items()
}  # fmt: skip
MAX_HEADER = 100_000_000  # the limit of the reference implementation
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_HASH_WHOLE, _SAMPLE = 64 << 20, 4096  # bytes
_RENEW = "the file is damaged or hostile: download or convert it again"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies. dtype: safetensors' name; start, stop: byte range within the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor as stored."""
        return self.stop - self.start


class SafetensorsFile:
    """One memory-mapped safetensors file; the whole header is checked before anything is served.

    Raises CheckpointError naming file, tensor and value for whatever the format forbids.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < 8:
                    raise CheckpointError(f"{self.path} has {size} bytes, too few for a header; {_RENEW}")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as cause:
            raise CheckpointError(
                f"cannot read {self.path}: {cause.strerror or cause}; check the path or download it again"
            ) from None
        self.size = size
        self.header = self._read_header(size)
        entries = parse_json_object(self.header.decode("utf-8"), f"the header of {self.path}")
        self.metadata = self._check_metadata(entries.pop("__metadata__", None))
        base = 8 + len(self.header)
        self._infos = {name: self._check_entry(name, entry, base, size) for name, entry in entries.items()}
        self._check_cover(base, size)

    def names(self) -> list[str]:
        """Names of all tensors, in header order."""
        return list(self._infos)

    def info(self, name: str) -> TensorInfo:
        """Shape, dtype and place of a tensor. Raises CheckpointError when there is none of that name."""
        try:
            return self._infos[name]
        except KeyError:
            raise CheckpointError(f"{self.path} has no tensor {name!r}; it has {len(self._infos)}") from None

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """The tensor as a read-only array in its stored dtype and shape.

        A view on the map (no copy), unless the file places it unaligned: kernels need aligned memory.
        """
        info = self.info(name)
        return self._view(info, info.start, info.shape)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray[Any, Any]:
        """Rows [start, stop) of the first axis, as `read` gives them. Raises CheckpointError out of range."""
        info = self.info(name)
        if not info.shape or not 0 <= start <= stop <= info.shape[0]:
            raise CheckpointError(
                f"{self.path}: rows {start}..{stop} of {name!r}, whose shape is {info.shape}"
            )
        row = info.nbytes // info.shape[0] if info.shape[0] else 0
        return self._view(info, info.start + start * row, (stop - start, *info.shape[1:]))

    def release(self, name: str) -> None:
        """Lets the kernel drop the tensor's pages from our memory; views stay valid and are read again."""
        info = self.info(name)
        start = -(-info.start // mmap.PAGESIZE) * mmap.PAGESIZE
        stop = info.stop // mmap.PAGESIZE * mmap.PAGESIZE
        if stop > start and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def raw(self, start: int, stop: int) -> bytes:
        """A copy of bytes [start, stop) of the file."""
        return self._map[start:stop]

    def _view(self, info: TensorInfo, offset: int, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        dtype = DTYPES[info.dtype]
        count = element_count(shape)
        if count == 0:
            return np.empty(shape, dtype)
        array = np.frombuffer(self._map, dtype, count, offset).reshape(shape)
        if not array.flags.aligned:
            array = array.copy()
            array.flags.writeable = False
        return array

    def _read_header(self, size: int) -> bytes:
        length = int.from_bytes(self._map[:8], "little")
        if length > MAX_HEADER:
            raise CheckpointError(
                f"{self.path}: header length {length}, above the {MAX_HEADER} allowed; {_RENEW}"
            )
        if length > size - 8:
            raise CheckpointError(
                f"{self.path}: header length {length}, but only {size - 8} bytes follow; {_RENEW}"
            )
        header = self._map[8 : 8 + length]
        if not header.startswith(b"{"):
            raise CheckpointError(
                f"{self.path}: the header starts with {header[:8]!r}, not with '{{'; {_RENEW}"
            )
        try:
            header.decode("utf-8")
        except UnicodeDecodeError as cause:
            raise CheckpointError(
                f"{self.path}: the header is not UTF-8 (byte {cause.start}); {_RENEW}"
            ) from None
        return header

    def _check_metadata(self, value: Any) -> dict[str, str]:
        if value is None:
            return {}
        if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
            raise CheckpointError(f"{self.path}: __metadata__ must map strings to strings; {_RENEW}")
        return value

    def _check_entry(self, name: str, entry: Any, base: int, size: int) -> TensorInfo:
        def refuse(problem: str) -> CheckpointError:
            return CheckpointError(f"{self.path}: tensor {name!r}: {problem}; {_RENEW}")

        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise refuse("its entry needs exactly dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise refuse(f"dtype {dtype!r} is unknown, known are {', '.join(DTYPES)}")
        if not _is_sizes(shape) or len(shape) > 32:
            raise refuse(f"shape {short(shape)} is not a list of at most 32 whole numbers in 0..2**63")
        if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise refuse(f"data_offsets {short(offsets)} is not [begin, end] with 0 <= begin <= end")
        begin, end = offsets
        if base + end > size:
            raise refuse(f"it ends at byte {short(end)} of {size - base} bytes of data (truncated?)")
        needed = element_count(shape) * DTYPES[dtype].itemsize
        if needed != end - begin:
            raise refuse(
                f"shape {short(shape)} of {dtype} needs {short(needed)} bytes, the offsets hold {end - begin}"
            )
        return TensorInfo(dtype, tuple(shape), base + begin, base + end)

    def _check_cover(self, base: int, size: int) -> None:
        """Data must be covered exactly once: overlaps alias tensors, holes hide foreign bytes."""
        at, before = base, "the header"
        for name, info in sorted(self._infos.items(), key=lambda item: (item[1].start, item[1].stop)):
            if info.start != at:
                kind = "overlaps" if info.start < at else "leaves a hole after"
                raise CheckpointError(
                    f"{self.path}: tensor {name!r} (data begins at {info.start - base}) {kind} {before}, "
                    f"which ends at {at - base}; {_RENEW}"
                )
            at, before = info.stop, f"tensor {name!r}"
        if at != size:
            raise CheckpointError(
                f"{self.path}: {size - at} bytes after the last tensor belong to none; {_RENEW}"
            )


class Checkpoint(Floats):
    """The tensors of a model directory: model.safetensors, or the shards model.safetensors.index.json names.

    Opening checks every shard's header and that each indexed tensor is where the index says, so that a
    damaged checkpoint is refused before any weight is loaded. Raises CheckpointError, also where there is
    only pickle: unpickling runs whatever code the file holds.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        single, index = self.directory / SINGLE, self.directory / INDEX
        if single.is_file():
            self._shards = {SINGLE: SafetensorsFile(single)}
            self._place = dict.fromkeys(self._shards[SINGLE].names(), SINGLE)
        elif index.is_file():
            self._place = _read_index(index)
            self._shards = {}
            for shard in sorted(set(self._place.values())):
                if not (self.directory / shard).is_file():
                    raise CheckpointError(
                        f"shard {shard!r}, named in {index}, is missing; download the model again"
                    )
                self._shards[shard] = SafetensorsFile(self.directory / shard)
            self._check_places(index)
        else:
            raise _nothing_readable(self.directory)

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._place)

    def __contains__(self, name: object) -> bool:
        return name in self._place

    def info(self, name: str) -> TensorInfo:
        """Shape, dtype and place (within its shard). Raises CheckpointError for an unknown name."""
        return self.shard(name).info(name)

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """As `SafetensorsFile.read`."""
        return self.shard(name).read(name)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray[Any, Any]:
        """As `SafetensorsFile.read_rows`."""
        return self.shard(name).read_rows(name, start, stop)

    def release(self, name: str) -> None:
        """As `SafetensorsFile.release`."""
        self.shard(name).release(name)

    def shard(self, name: str) -> SafetensorsFile:
        """The file that holds a tensor. Raises CheckpointError for an unknown name."""
        if name not in self._place:
            near = get_close_matches(name, self._place, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise CheckpointError(
                f"{self.directory} has no tensor {name!r} among its {len(self._place)}{hint}"
            )
        return self._shards[self._place[name]]

    def content_key(self) -> str:
        """32 hex digits that name the content: a key for caches of packed weights.

        Covers file names, sizes, headers and data: whole files up to 64 MB; of larger ones 3 x 4 KiB of
        every tensor and the time of the last change (hashing gigabytes would cost more than the cache saves).
        """
        digest = hashlib.blake2b(digest_size=16)
        for name, file in sorted(self._shards.items()):
            size = file.size
            digest.update(f"{name}\0{size}\0".encode())
            if size <= _HASH_WHOLE:
                digest.update(file.raw(0, size))
                continue
            digest.update(f"{file.path.stat().st_mtime_ns}\0".encode() + file.header)
            for tensor in file.names():
                info = file.info(tensor)
                last = max(info.stop - _SAMPLE, info.start)
                for at in (info.start, (info.start + last) // 2, last):
                    digest.update(file.raw(at, min(at + _SAMPLE, info.stop)))
        return digest.hexdigest()

    def _check_places(self, index: Path) -> None:
        held = {name: set(file.names()) for name, file in self._shards.items()}
        for tensor, shard in self._place.items():
            if tensor not in held[shard]:
                raise CheckpointError(
                    f"tensor {tensor!r} is not in {shard!r}, where {index} places it; "
                    "download the model again"
                )


def _read_index(path: Path) -> dict[str, str]:
    places = read_json_object(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{path} has no weight_map {{tensor: file}}; download the file again")
    for tensor, shard in places.items():
        # Only a bare name: anything with a folder in it could lead out of the model's directory.
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\\0:]+\.safetensors", shard):
            raise CheckpointError(
                f"{path} places {tensor!r} in {short(shard)}; only the name of a .safetensors file "
                "in the same directory is allowed"
            )
    return places


def _nothing_readable(directory: Path) -> CheckpointError:
    if not directory.is_dir():
        return CheckpointError(f"{directory} is not a directory; pass a model directory or a hub id")
    names = sorted(entry.name for entry in directory.iterdir() if entry.is_file())
    pickled = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    if pickled:
        return CheckpointError(
            f"{directory} has weights only as pickle ({', '.join(pickled[:3])}), which is refused because "
            "loading it runs code; convert it on a machine you trust: transformers' "
            "from_pretrained(...).save_pretrained(..., safe_serialization=True)"
        )
    other = [name for name in names if name.endswith(".safetensors")]
    found = f"; found {', '.join(other[:3])}: rename or index it" if other else ""
    return CheckpointError(
        f"no weights in {directory}: looked for {SINGLE} and {INDEX}{found}. "
        "Download the model again (pickle files are never downloaded), or pass --load-format dummy"
    )


def element_count(shape: Sequence[int]) -> int:
    """Product of the extents. Python's integers cannot overflow: a hostile product merely fits no offsets."""
    total = 1
    for extent in shape:
        total *= extent
    return total


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def short(value: Any) -> str:
    """repr of a foreign value, cut so that a message stays readable."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
