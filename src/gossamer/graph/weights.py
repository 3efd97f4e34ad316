"""Weight expressions: how a graph's weight comes out of checkpoint tensors, as data.

Each expression is invertible, so that a changed weight can be written back under the family's own
names. Evaluation and inversion live in `gossamer.checkpoint.weights`; here is only the description.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

__all__ = [
    "Columns",
    "Concat",
    "Constant",
    "Shift",
    "Slice",
    "Stack",
    "Tensor",
    "Transpose",
    "WeightExpr",
    "leaves",
    "renamed",
    "stored_format",
]


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of the checkpoint, with the shape that config.json implies for it.

    format, group: how the checkpoint stores it, as in `Weight`; families always say "f32", which stands for
    any float, and `gossamer.checkpoint.weights.as_stored` what the files hold.
    """

    name: str
    shape: tuple[int, ...]
    format: str = "f32"
    group: int = 0


@dataclass(frozen=True, slots=True)
class Constant:
    """Values computed from config.json (rotary frequencies); not in the checkpoint."""

    values: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.values),)


@dataclass(frozen=True, slots=True)
class Slice:
    """source[start:stop] along axis (fused checkpoints)."""

    source: WeightExpr
    axis: int
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.source.shape)
        shape[self.axis] = self.stop - self.start
        return tuple(shape)


@dataclass(frozen=True, slots=True)
class Transpose:
    """source with its two axes swapped."""

    source: WeightExpr

    @property
    def shape(self) -> tuple[int, ...]:
        rows, columns = self.source.shape
        return (columns, rows)


@dataclass(frozen=True, slots=True)
class Shift:
    """source + value (norms stored around zero)."""

    source: WeightExpr
    value: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape


@dataclass(frozen=True, slots=True)
class Concat:
    """Sources one after the other along the first axis."""

    sources: tuple[WeightExpr, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(s.shape[0] for s in self.sources), *self.sources[0].shape[1:])


@dataclass(frozen=True, slots=True)
class Stack:
    """Sources of equal shape along a new first axis (experts)."""

    sources: tuple[WeightExpr, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.sources), *self.sources[0].shape)


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns of a matrix in another order: column i is the source's order[i].

    format, group: how the checkpoint stores it in this order, where it does, as in `Tensor`.
    """

    source: Tensor
    order: tuple[int, ...]
    format: str = "f32"
    group: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape


WeightExpr = Tensor | Constant | Slice | Transpose | Shift | Concat | Stack | Columns


def leaves(expr: WeightExpr) -> Iterator[Tensor]:
    """The checkpoint tensors an expression reads, in order."""
    if isinstance(expr, Tensor):
        yield expr
    elif isinstance(expr, Concat | Stack):
        for source in expr.sources:
            yield from leaves(source)
    elif not isinstance(expr, Constant):
        yield from leaves(expr.source)


def renamed(expr: WeightExpr, names: Mapping[str, str]) -> WeightExpr:
    """The same expression over tensors of other names; those absent from `names` keep theirs."""
    if isinstance(expr, Tensor):
        return replace(expr, name=names.get(expr.name, expr.name))
    if isinstance(expr, Concat | Stack):
        return replace(expr, sources=tuple(renamed(source, names) for source in expr.sources))
    if isinstance(expr, Constant):
        return expr
    if isinstance(expr, Columns):
        return replace(expr, source=replace(expr.source, name=names.get(expr.source.name, expr.source.name)))
    return replace(expr, source=renamed(expr.source, names))


def stored_format(expr: WeightExpr) -> tuple[str, int]:
    """The format and group in which a checkpoint stores an expression; ("f32", 0): floats, or computed."""
    if isinstance(expr, Slice):
        return stored_format(expr.source) if expr.axis == 0 else ("f32", 0)
    if isinstance(expr, Concat | Stack):
        found = {stored_format(source) for source in expr.sources}
        return found.pop() if len(found) == 1 else ("f32", 0)
    return (expr.format, expr.group) if isinstance(expr, Tensor | Columns) else ("f32", 0)
