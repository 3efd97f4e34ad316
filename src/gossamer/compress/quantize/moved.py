"""What a step that moves factors between weights shares with others that do: which matrices read a value, and
the floats that changed, kept and put back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gossamer.checkpoint.codes import Floats
from gossamer.checkpoint.safetensors import SafetensorsFile
from gossamer.checkpoint.weights import evaluate
from gossamer.compress.blocks import BlockAt, Site
from gossamer.compress.quantize.life import FLOAT, Step
from gossamer.compress.quantize.scaling import Scaling
from gossamer.graph.weights import Constant, leaves

__all__ = ["changed_floats", "put_floats_back", "readers_of"]

Array = npt.NDArray[Any]


def readers_of(scaling: Scaling, sites: Iterable[Site]) -> tuple[list[Site], Sequence[int] | None]:
    """The sites whose columns a scaling multiplies, and which factor each column takes. A router reads a
    norm's value as well, but has no site: it is not quantized."""
    columns = {place.weight: place for place in scaling.multiplied}
    planes = {place.plane for place in scaling.multiplied}
    found = [
        site
        for site in sites
        if any(name in columns for name in site.matrices) and (planes == {None} or site.plane in planes)
    ]
    return found, scaling.multiplied[0].factor


def changed_floats(
    step: Step, block: BlockAt, moved: Iterable[Scaling], coded: Iterable[str] = ()
) -> dict[str, Array]:
    """Checkpoint tensors of a block that scalings changed and that stay floats. coded: matrices that do not.

    Vectors are float32, since a norm that is rounded again would shift what was balanced; matrices have the
    dtype they had, float32 where that would overflow.
    """
    weights = block.model.graph.weights
    touched = {place.weight for scaling in moved for place in (*scaling.divided, *scaling.multiplied)}
    out = {leaf.name for name in coded if name in weights for leaf in leaves(weights[name].expr)}
    names = {leaf.name for weight in touched for leaf in leaves(weights[weight].expr)} - out
    found = {}
    for name, array in block.tensors().items():
        if name in names:
            narrow = array if array.ndim == 1 else array.astype(step.source.read(name).dtype)
            found[name] = narrow if np.isfinite(narrow.astype(np.float32)).all() else array
    return found


def put_floats_back(step: Step, block: BlockAt) -> None:
    """Fills a block's weights with the floats that its results hold."""
    kept = _Kept(step.results.open(block.scope))
    for name, weight in block.model.graph.weights.items():
        parts = [leaf.name for leaf in leaves(weight.expr)]
        if not isinstance(weight.expr, Constant) and all(part in kept.names for part in parts):
            value = np.asarray(evaluate(weight.expr, kept), np.float32)
            block.model.weight(name).data.copy_(torch.from_numpy(value.copy()))


class _Kept(Floats):
    """A block's float results as a source of weights."""

    def __init__(self, file: SafetensorsFile) -> None:
        self._file = file
        self.names = {n.removeprefix(FLOAT) for n in file.names() if n.startswith(FLOAT)}

    def read(self, name: str) -> Array:
        return self._file.read(FLOAT + name)

    def read_rows(self, name: str, start: int, stop: int) -> Array:
        return self._file.read_rows(FLOAT + name, start, stop)

    def release(self, name: str) -> None:
        """Results are small and stay."""

    def content_key(self) -> str:
        raise NotImplementedError("results of a block are not what a cache is made from")
