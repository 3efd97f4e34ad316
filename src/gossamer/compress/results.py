"""Results of a step's blocks on disk: what outlives an interruption, and what the model is written from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer.checkpoint.safetensors import SafetensorsFile
from gossamer.checkpoint.safetensors_writer import write_safetensors

__all__ = ["BlockResults"]

Array = npt.NDArray[Any]


class BlockResults:
    """Named arrays per block, each block written aside and renamed: it is there whole or not at all."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __contains__(self, scope: str) -> bool:
        return self._path(scope).exists()

    def save(self, scope: str, arrays: Mapping[str, Array]) -> None:
        """Keeps a block's arrays."""
        write_safetensors(self._path(scope), {name: np.asarray(a) for name, a in arrays.items()})

    def open(self, scope: str) -> SafetensorsFile:
        """A block's arrays, memory-mapped. Raises CheckpointError for a damaged file."""
        return SafetensorsFile(self._path(scope))

    def scopes(self) -> list[str]:
        """The blocks that are there."""
        return sorted(path.name.removesuffix(".block") for path in self.directory.glob("*.block"))

    def _path(self, scope: str) -> Path:
        return self.directory / f"{scope}.block"
