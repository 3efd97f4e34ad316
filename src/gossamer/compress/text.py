"""Text files as windows of tokens, in an order that depends on the seed and the position alone."""

from __future__ import annotations

import lzma
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gossamer.checkpoint.tokenizer import Tokenizer
from gossamer.errors import CheckpointError, ConfigError

__all__ = ["Windows", "read_tokens", "spread_windows"]

_PIECE = 1 << 16  # characters encoded at a time, cut at line ends
Ids = npt.NDArray[np.int32]


def read_tokens(files: Iterable[Path], tokenizer: Tokenizer, most: int | None = None) -> Ids:
    """The files' tokens one after the other, at most `most`. Files are UTF-8 text, plain or .xz.

    Raises CheckpointError for a file that cannot be read, ConfigError where there is no text at all.
    """
    parts: list[Ids] = []
    count = 0
    for path in files:
        for piece in _pieces(path):
            ids = np.asarray(tokenizer.encode(piece, add_special_tokens=False), np.int32)
            parts.append(ids if most is None else ids[: most - count])
            count += len(parts[-1])
            if count == most:
                return np.concatenate(parts)
    if not count:
        raise ConfigError("the text files hold no text; name files of plain text, or .xz of it")
    return np.concatenate(parts)


def spread_windows(tokens: Ids, length: int, count: int) -> Ids:
    """Windows [count, length] that do not overlap, spread evenly over the text.

    Raises ConfigError for a text that is too short for them.
    """
    if len(tokens) < count * length:
        raise ConfigError(
            f"the calibration text has {len(tokens)} tokens, and {count} windows of {length} take "
            f"{count * length}; give more text, or fewer samples or a shorter context in the recipe's [data]"
        )
    starts = np.linspace(0, len(tokens) - length, count).astype(np.int64) if count > 1 else [0]
    return np.stack([tokens[start : start + length] for start in starts])


def _pieces(path: Path) -> Iterator[str]:
    try:
        opened = lzma.open if path.suffix == ".xz" else open
        with opened(path, "rt", encoding="utf-8") as file:
            while lines := file.readlines(_PIECE):
                yield "".join(lines)
    except (OSError, lzma.LZMAError, EOFError, UnicodeDecodeError) as cause:
        raise CheckpointError(f"cannot read text from {path}: {cause}; name UTF-8 text files") from None


class Windows:
    """Shuffled windows of `length` tokens; each epoch shifts the grid and draws a new order."""

    def __init__(self, tokens: Ids, length: int, seed: int) -> None:
        """Raises ConfigError for a text too short for two windows."""
        if len(tokens) < 2 * length:
            raise ConfigError(
                f"the text has {len(tokens)} tokens, and a window takes {length}; give more text or a "
                "shorter context"
            )
        self.tokens, self.length, self.seed = tokens, length, seed
        self.per_epoch = len(tokens) // length - 1
        self._epoch, self._starts = -1, np.empty(0, np.int64)

    def batch(self, position: int, size: int) -> Ids:
        """Windows position ... position + size - 1, [size, length]."""
        return np.stack([self._window(position + i) for i in range(size)])

    def _window(self, index: int) -> Ids:
        epoch, within = divmod(index, self.per_epoch)
        if epoch != self._epoch:
            random = np.random.default_rng((self.seed, epoch))
            shift = int(random.integers(self.length))
            self._starts = random.permutation(self.per_epoch) * self.length + shift
            self._epoch = epoch
        start = int(self._starts[within])
        return self.tokens[start : start + self.length]
