"""A teacher's largest probabilities on disk, so that it need not run beside its student.

`lessons` is a row of records of one size, one for each window in the order of training: tokens [L, K] (uint16
where the vocabulary allows, else int32), log probabilities [L, K] float16 and the share of all other tokens
[L] float32. `key` says whose they are. Windows are appended, so that whatever stopped it, filling goes on
behind the last whole batch.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from gossamer.compress.distill.losses import FullTarget, TopTarget
from gossamer.compress.distill.teacher import Lesson, Teacher
from gossamer.compress.text import Windows
from gossamer.errors import CheckpointError

__all__ = ["LogitCache", "cache_key", "record_bytes"]

Ids = npt.NDArray[np.int32]


def cache_key(teacher: str, tokens: Ids, **settings: object) -> str:
    """A name for what a cache holds. teacher: its content key; settings: all else that it depends on."""
    text = hashlib.sha256(np.ascontiguousarray(tokens).data).hexdigest()
    return hashlib.sha256(repr((teacher, text, sorted(settings.items()))).encode()).hexdigest()


def record_bytes(length: int, kept: int, vocab: int) -> int:
    """Of one window on disk."""
    return length * (kept * (_ids_dtype(vocab).itemsize + 2) + 4)


class LogitCache:
    """A Teacher whose lessons lie in a directory."""

    def __init__(
        self, directory: Path, key: str, *, length: int, kept: int, vocab: int, temperature: float
    ) -> None:
        """Opens or begins a cache; what is there under another key is removed."""
        self.length, self.kept, self.temperature = length, min(kept, vocab), temperature
        self._dtype = _ids_dtype(vocab)
        self._record = record_bytes(length, self.kept, vocab)
        self._path = directory / "lessons"
        directory.mkdir(parents=True, exist_ok=True)
        named = directory / "key"
        if not named.exists() or named.read_text() != key:
            self._path.unlink(missing_ok=True)
            aside = directory / ".key.part"
            aside.write_text(key)
            os.replace(aside, named)

    def __len__(self) -> int:
        """Whole windows there are."""
        return self._path.stat().st_size // self._record if self._path.exists() else 0

    def fill(
        self,
        teacher: Callable[[], Teacher],
        windows: Windows,
        count: int,
        batch: int,
        on_batch: Callable[[int], None] = lambda done: None,
    ) -> None:
        """Lessons of windows 0 ... count - 1, as far as they are missing; teacher() is called where any is.

        Always in the same batches, so that an interruption changes no bit. Raises CheckpointError where the
        disk is full; what is there stays.
        """
        start = len(self) // batch * batch
        if len(self) >= count:
            return
        running = teacher()
        try:
            with self._path.open("r+b" if self._path.exists() else "w+b") as file:
                file.truncate(start * self._record)
                file.seek(0, os.SEEK_END)
                for position in range(start, count, batch):
                    on_batch(position)
                    lesson = running.lesson(position, windows.batch(position, batch))
                    assert isinstance(lesson.target, FullTarget)
                    file.write(self._records(lesson.target))
                    file.flush()
        except OSError as cause:
            raise CheckpointError(
                f"cannot keep the teacher's logits in {self._path.parent}: {cause}; free "
                f"{(count - len(self)) * self._record >> 20} MiB there, or lower "
                "cache_logits; what is there stays"
            ) from None
        on_batch(count)

    def lesson(self, position: int, ids_BL: Ids) -> Lesson:
        """As Teacher's; without taps."""
        with self._path.open("rb") as file:
            file.seek(position * self._record)
            data = file.read(len(ids_BL) * self._record)
        records = np.frombuffer(data, np.uint8).reshape(len(ids_BL), self._record)
        size = self.length * self.kept
        cut = np.cumsum([size * self._dtype.itemsize, size * 2])
        ids, logs, rest = np.split(records, cut, axis=1)

        def read(part: npt.NDArray[np.uint8], dtype: npt.DTypeLike, width: int) -> npt.NDArray[np.float64]:
            array: npt.NDArray[np.float64] = np.ascontiguousarray(part).view(dtype).reshape(-1, width)
            return array

        return Lesson(
            TopTarget(
                torch.from_numpy(read(ids, self._dtype, self.kept).astype(np.int64)),
                torch.from_numpy(read(logs, np.float16, self.kept).astype(np.float32)),
                torch.from_numpy(read(rest, np.float32, 1)[:, 0].astype(np.float32)),
            ),
            {},
        )

    def _records(self, target: FullTarget) -> bytes:
        out = bytearray()
        for start in range(0, len(target.logits), self.length):
            log_p = target.rows(slice(start, start + self.length)).log_p(self.temperature)
            logs, ids = log_p.topk(self.kept)
            # Of the others themselves: one less the sum of the kept would be mostly rounding.
            rest = log_p.scatter(-1, ids, float("-inf")).exp().sum(-1)
            out += ids.numpy().astype(self._dtype).tobytes()
            out += logs.half().numpy().tobytes() + rest.numpy().tobytes()
        return bytes(out)


def _ids_dtype(vocab: int) -> np.dtype[np.uint16] | np.dtype[np.int32]:
    return np.dtype(np.uint16) if vocab <= 1 << 16 else np.dtype(np.int32)
