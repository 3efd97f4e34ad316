"""Packed weights on disk, for the next start.

A file is a header of one JSON line padded to 4 KiB, the block as it lies in memory, and a checksum for every
MiB of it. Files are written aside and renamed, so that one of that name is whole, whoever else writes and
whoever is killed; whatever is wrong with one makes it absent.

Reading into huge pages beats mapping the file: its pages would be 4 KiB, and every token would pay for the
lookups. Two threads reach what the page cache gives, and what a cold disk gives.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer import _native

__all__ = ["CacheEntry", "cache_entries", "make_room", "read_cache", "write_cache"]

_VERSION = 2  # of the file around the block
_HEADER = 4096
_SUFFIX = ".packed"
_ABANDONED = 24 * 3600  # seconds after which no writer can still be at a file

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheEntry:
    """A file of the cache. bytes: on disk; used: when it was last read or written, in seconds since 1970;
    model: what it was made for, "" where the header is damaged or of another version."""

    path: Path
    bytes: int
    used: float
    model: str


def read_cache(path: Path, block: Bytes, layout: int, pool: _native.Pool) -> bool:
    """Fills the block from a file of this packed layout; False where there is no whole and undamaged one."""
    sums = np.empty(_native.checksum_blocks(block.nbytes), np.uint64)
    try:
        if not path.is_file():  # opening a pipe would wait for its writer
            return False
        with path.open("rb") as file:
            header = _header(file.read(_HEADER))
            same = (header.get("version"), header.get("layout"), header.get("bytes"))
            size = _HEADER + block.nbytes + sums.nbytes
            if same != (_VERSION, layout, block.nbytes) or os.fstat(file.fileno()).st_size != size:
                return False
            if not _read(file.fileno(), block, _HEADER) or not _read(file.fileno(), sums, size - sums.nbytes):
                return False
        if not np.array_equal(sums, _checksums(pool, block)):
            return False
        with contextlib.suppress(OSError):  # a read-only file keeps its age
            os.utime(path)
    except (OSError, ValueError):
        return False
    return True


def write_cache(
    path: Path, block: Bytes, layout: int, pool: _native.Pool, *, model: str, limit: int | None
) -> None:
    """Writes the block, after making room within `limit` bytes; one that is larger is not kept. A full or
    read-only disk costs the cache, not the run."""
    header = {"format": "gossamer-packed", "version": _VERSION, "layout": layout, "bytes": block.nbytes}
    sums = _checksums(pool, block)
    size = _HEADER + block.nbytes + sums.nbytes
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob("*.tmp"):  # by a writer that was killed
            with contextlib.suppress(OSError):  # swept by another process meanwhile, or no file
                if left.stat().st_mtime < time.time() - _ABANDONED:
                    left.unlink()
        if limit is not None:
            make_room(path.parent, limit - size if size <= limit else limit)
            if size > limit:
                return
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(json.dumps(header | {"model": model[:1000]}).encode().ljust(_HEADER - 1) + b"\n")
                file.write(block.data)
                file.write(sums.data)
                file.flush()
                os.fsync(file.fileno())  # else a power cut after the rename leaves zeros under its name
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def cache_entries(directory: Path) -> list[CacheEntry]:
    """What the cache holds, least recently used first; a directory that is absent holds nothing."""
    return sorted(_entries(directory), key=lambda entry: entry.used)


def make_room(directory: Path, limit: int) -> list[CacheEntry]:
    """Removes least recently used files until at most `limit` bytes are left; gives those removed.

    Raises OSError where one cannot be removed.
    """
    entries = cache_entries(directory)
    total, gone = sum(entry.bytes for entry in entries), []
    for entry in entries:
        if total <= limit:
            break
        entry.path.unlink(missing_ok=True)
        total -= entry.bytes
        gone.append(entry)
    return gone


def _entries(directory: Path) -> Iterator[CacheEntry]:
    for path in directory.glob(f"*{_SUFFIX}"):
        try:
            if not path.is_file():
                continue
            status = path.stat()
            with path.open("rb") as file:
                header = _header(file.read(_HEADER))
        except OSError:  # removed by another process meanwhile
            continue
        model = header.get("model") if header.get("version") == _VERSION else None
        yield CacheEntry(
            path=path,
            bytes=status.st_size,
            used=status.st_mtime,
            model=model if isinstance(model, str) else "",
        )


def _header(start: bytes) -> dict[str, Any]:
    try:
        header = json.loads(start)
    except (ValueError, RecursionError):
        return {}
    return header if isinstance(header, dict) else {}


def _checksums(pool: _native.Pool, block: Bytes) -> npt.NDArray[np.uint64]:
    sums = np.empty(_native.checksum_blocks(block.nbytes), np.uint64)
    _native.checksums(pool, block, sums.view(np.uint8))
    return sums


def _read(descriptor: int, into: npt.NDArray[Any], offset: int) -> bool:
    """Fills the array from the file; False where it ends too early."""
    view = into.view(np.uint8).data
    parts = max(1, min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2))
    bounds = [view.nbytes * i // parts for i in range(parts + 1)]

    def read(i: int) -> bool:
        low, high = bounds[i], bounds[i + 1]
        while low < high:
            count = os.preadv(descriptor, [view[low : min(high, low + (64 << 20))]], offset + low)
            if count == 0:
                return False
            low += count
        return True

    with ThreadPoolExecutor(parts) as threads:
        return all(threads.map(read, range(parts)))
