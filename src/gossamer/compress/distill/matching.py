"""Matching what happens inside a student to what happens inside its teacher, layer by layer.

Layers are mapped evenly, the last to the last. Where widths differ a linear projection lifts the student's
values to the teacher's width; projections are trained along and thrown away (Jiao et al., TinyBERT, 2020).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gossamer.compress.distill.losses import distances
from gossamer.graph.ir import Graph

__all__ = ["Matching", "layer_map"]


def layer_map(layers: int, of: int) -> tuple[int, ...]:
    """The teacher's layer for each of a student's; of: how many the teacher has."""
    return tuple(max(0, round((i + 1) * of / layers) - 1) for i in range(layers))


class Matching(nn.Module):
    """Pairs of values, the student's [T, A] and the teacher's [T, B], with what projects the one to the
    other."""

    def __init__(
        self, student: Graph, teacher: Graph, mine: Sequence[str], theirs: Sequence[str], seed: int
    ) -> None:
        """mine, theirs: the values of all layers of each, first to last."""
        super().__init__()
        self.pairs = tuple(zip(mine, (theirs[i] for i in layer_map(len(mine), len(theirs))), strict=True))
        self.projections = nn.ParameterList()
        self._projected: list[int | None] = []
        generator = torch.Generator().manual_seed(seed)
        for own, other in self.pairs:
            narrow, wide = _width(student, own), _width(teacher, other)
            self._projected.append(None if narrow == wide else len(self.projections))
            if narrow != wide:
                # As if the student's values were some of the teacher's, to begin with.
                weight = (
                    torch.eye(wide, narrow)
                    + torch.randn(wide, narrow, generator=generator) * 0.1 / narrow**0.5
                )
                self.projections.append(nn.Parameter(weight))

    def forward(self, mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Tensor:
        """Mean distance over the pairs [], relative to the size of the teacher's values."""
        total = []
        for (own, other), index in zip(self.pairs, self._projected, strict=True):
            value = mine[own]
            if index is not None:
                value = F.linear(value.float(), self.projections[index])
            total.append(distances(value, theirs[other]))
        return torch.stack(total).mean()


def _width(graph: Graph, value: str) -> int:
    width = graph.values[value].shape[-1]
    assert isinstance(width, int)
    return width
