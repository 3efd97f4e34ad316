"""What the rows of a span have before them: the history that penalties, noise and grammars go by."""

from __future__ import annotations

from collections.abc import Sequence

from gossamer.engine.step import Span
from gossamer.graph.ops.attention import tree_depths

__all__ = ["produced_before"]


def produced_before(span: Span, tokens: Sequence[int]) -> list[Sequence[int]]:
    """Per row, the tokens of the span (given as they are known now) that count as produced before it: those
    after the first sampled row along the row's own path. None for rows whose token is a target."""
    targets = span.targets or (-1,) * len(span.rows)
    first = next((row for row, target in zip(span.rows, targets, strict=True) if target < 0), None)
    if first is None:
        return [()] * len(span.rows)
    if span.parents is None:
        return [tokens[first + 1 : row + 1] if t < 0 else () for row, t in zip(span.rows, targets)]
    above = tree_depths(span.parents)[first] + 1
    out: list[Sequence[int]] = []
    for row, target in zip(span.rows, targets):
        path: list[int] = []
        while row >= 0 and target < 0:
            path.append(tokens[row])
            row = span.parents[row]
        out.append(path[::-1][above:])
    return out
