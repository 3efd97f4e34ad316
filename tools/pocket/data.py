"""Windows over the token file, in an order that depends on the seed and the position alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Windows:
    """Shuffled windows of `context + 1` tokens; each epoch shifts the grid and draws a new order."""

    def __init__(self, path: Path, *, context: int, seed: int, validation_tokens: int) -> None:
        self.path, self.validation_tokens = path, validation_tokens
        tokens = np.memmap(path, dtype=np.uint16, mode="r")
        if len(tokens) < validation_tokens + 2 * (context + 1):
            raise ValueError(f"{path} has {len(tokens)} tokens, too few for windows of {context}")
        self.train, self.held = tokens[:-validation_tokens], tokens[-validation_tokens:]
        self.context, self.seed = context, seed
        self.per_epoch = (len(self.train) - context - 1) // context
        self._epoch = -1
        self._starts: np.ndarray = np.empty(0, dtype=np.int64)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process maps the file itself."""
        return open_windows, (self.path, self.context, self.seed, self.validation_tokens)

    def batch(self, position: int, size: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, `[size, context]` int64, of the windows `position ... position + size - 1`."""
        rows = [self._window(position + i) for i in range(size)]
        return split(np.stack(rows))

    def validation(self, size: int) -> list[tuple[Tensor, Tensor]]:
        """The reserved tail of the file as batches of `size` windows."""
        count = (len(self.held) - 1) // self.context
        rows = [self.held[i * self.context : (i + 1) * self.context + 1] for i in range(count)]
        return [split(np.stack(rows[i : i + size])) for i in range(0, count - size + 1, size)]

    def _window(self, index: int) -> np.ndarray:
        epoch, within = divmod(index, self.per_epoch)
        if epoch != self._epoch:
            random = np.random.default_rng((self.seed, epoch))
            shift = int(random.integers(self.context))
            self._starts, self._epoch = random.permutation(self.per_epoch) * self.context + shift, epoch
        start = int(self._starts[within])
        return self.train[start : start + self.context + 1]


def open_windows(path: Path, context: int, seed: int, validation_tokens: int) -> Windows:
    """`Windows` with positional arguments."""
    return Windows(path, context=context, seed=seed, validation_tokens=validation_tokens)


def split(rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """Windows `[B, context + 1]` to inputs and targets."""
    ids = torch.from_numpy(rows.astype(np.int64))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
