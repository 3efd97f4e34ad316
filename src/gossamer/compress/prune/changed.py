"""A checkpoint with the tensors of finished blocks in place of its own."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy.typing as npt

from gossamer.checkpoint.codes import Floats
from gossamer.checkpoint.model_writer import from_checkpoint
from gossamer.checkpoint.safetensors import SafetensorsFile
from gossamer.checkpoint.safetensors_writer import LazyTensor
from gossamer.checkpoint.weights import ModelSource
from gossamer.compress.results import BlockResults

__all__ = ["Changed"]

Array = npt.NDArray[Any]


class Changed(Floats):
    """A `WeightSource` of floats."""

    def __init__(self, checkpoint: ModelSource, results: BlockResults) -> None:
        """Begins with the blocks that the results hold already."""
        self.checkpoint, self.results = checkpoint, results
        self._files: dict[str, SafetensorsFile] = {}
        for scope in results.scopes():
            self._open(scope)

    def save(self, scope: str, tensors: Mapping[str, Array]) -> None:
        """Keeps a block's tensors, which are read from here on."""
        self.results.save(scope, tensors)
        self._open(scope)

    def tensors(self) -> dict[str, LazyTensor]:
        """All that the checkpoint has, read when written."""
        found = from_checkpoint(self.checkpoint)
        for name, file in self._files.items():
            info = file.info(name)
            found[name] = LazyTensor(info.dtype, info.shape, partial(file.read, name))
        return found

    def read(self, name: str) -> Array:
        """A whole tensor."""
        return self._of(name).read(name)

    def read_rows(self, name: str, start: int, stop: int) -> Array:
        """Rows [start, stop)."""
        return self._of(name).read_rows(name, start, stop)

    def release(self, name: str) -> None:
        """Its pages may leave memory."""
        self._of(name).release(name)

    def content_key(self) -> str:
        """Of the checkpoint: what is at work here is never cached."""
        return self.checkpoint.content_key()

    def _of(self, name: str) -> SafetensorsFile | ModelSource:
        return self._files.get(name, self.checkpoint)

    def _open(self, scope: str) -> None:
        file = self.results.open(scope)
        self._files |= dict.fromkeys(file.names(), file)
