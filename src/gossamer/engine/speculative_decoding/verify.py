"""Which tokens of a draft stand: those that the model itself chose.

Every token is drawn with noise that depends on seed, output index and token id alone, so what a row gives is
what plain decoding would give after the same tokens; a draft is right where it named that very token, and
the output is plain decoding's, whatever the sampling parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

from gossamer.engine.speculative_decoding.draft import Draft
from gossamer.engine.step import RowResult

__all__ = ["accepted_path", "path_of"]


def accepted_path(draft: Draft, rows: Sequence[RowResult]) -> list[int]:
    """Offsets of the rows that stand, the newest token's (0) first: each but the last named the next one.

    rows: what the model chose after the newest token and after each token of the draft.
    """
    path, tokens = [0], draft.tokens
    if draft.parents is None:
        while len(path) <= len(tokens) and rows[path[-1]].token == tokens[path[-1]]:
            path.append(len(path))
        return path
    children = {(parent + 1, token): i + 1 for i, (parent, token) in enumerate(zip(draft.parents, tokens))}
    while (child := children.get((path[-1], rows[path[-1]].token))) is not None:
        path.append(child)
    return path


def path_of(draft: Draft, taken: Sequence[int]) -> list[int]:
    """The same offsets, where it is known which of the draft's tokens were taken."""
    if draft.parents is None:
        return list(range(len(taken) + 1))
    children = {
        (parent + 1, token): i + 1 for i, (parent, token) in enumerate(zip(draft.parents, draft.tokens))
    }
    path = [0]
    for token in taken:
        path.append(children[path[-1], token])
    return path
