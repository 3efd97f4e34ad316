"""Structured output: which tokens a grammar allows next.

`Grammar` is what the engine asks; `LLGrammar` answers by llguidance (https://github.com/guidance-ai/llguidance),
an Earley parser over a lexer of derivatives that walks the vocabulary as a trie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol, TypeAlias

from gossamer.engine.speculative_decoding.draft import Draft
from gossamer.engine.step import Mask

if TYPE_CHECKING:
    from llguidance import LLMatcher

__all__ = ["Grammar", "GrammarFactory", "LLGrammar"]


class Grammar(Protocol):
    """The state of one output. Nothing but `accept` changes it."""

    def prune(self, draft: Draft) -> Draft | None:
        """The draft without what is not allowed; None where nothing is left."""

    def masks(self, draft: Draft | None) -> list[Mask | None]:
        """What is allowed after the newest token and after each token of the draft, in order. End tokens are
        allowed where the output may end."""

    def accept(self, token: int) -> None:
        """A token was taken; not called for those that end the output."""

    @property
    def ended(self) -> bool:
        """Whether nothing but the end may follow."""

    @property
    def error(self) -> str:
        """Why it can go on no more, and then allows nothing; "" while all is well."""


GrammarFactory: TypeAlias = Callable[[], Grammar]
_UNSPELLABLE = "no token of the vocabulary fits the grammar"


class LLGrammar:
    """A `Grammar` over an llguidance matcher.

    start: a matcher that has consumed nothing; it is copied, never changed. Its end token is the id after
    the vocabulary, and it spells `ends` as nothing: only this class allows them. ends: tokens that end the
    output; vocab: of the model.
    """

    __slots__ = (
        "_ends",
        "_error",
        "_history",
        "_mask",
        "_matcher",
        "_nothing",
        "_only_ends",
        "_start",
        "_vocab",
    )

    def __init__(self, start: LLMatcher, ends: tuple[int, ...], vocab: int) -> None:
        self._start, self._ends, self._vocab = start, ends, vocab
        self._matcher = start.deep_copy()
        self._history: list[int] = []
        self._nothing: Mask = bytes(-(-vocab // 32) * 4)
        self._only_ends = self._with_ends(bytearray(self._nothing))
        self._mask: Mask | None = None  # of the newest token's row, once asked for
        self._error = ""

    def prune(self, draft: Draft) -> Draft | None:
        """See `Grammar`. End tokens go too: the row before them samples one as cheaply."""
        kept = sorted(self._walk(draft))
        if len(kept) == len(draft.tokens):
            return draft
        if not kept:
            return None
        tokens = [draft.tokens[i] for i in kept]
        if draft.parents is None:
            return Draft(tokens)
        place = {-1: -1} | {old: new for new, old in enumerate(kept)}
        return Draft(tokens, [place[draft.parents[i]] for i in kept])

    def masks(self, draft: Draft | None) -> list[Mask | None]:
        """See `Grammar`. Nothing is allowed after a token of the draft that is not allowed itself."""
        masks: list[Mask | None] = [self._newest()]
        if draft is not None:
            masks += [self._nothing] * len(draft.tokens)
            for i in self._walk(draft):
                masks[i + 1] = self._allowed()
        return masks

    def accept(self, token: int) -> None:
        """A token was taken; not called for those that end the output."""
        self._mask = None
        self._history.append(token)
        if not self._error and not self._matcher.consume_token(token):
            self._error = _reason(self._matcher)

    @property
    def ended(self) -> bool:
        """Whether nothing but the end may follow."""
        return not self._error and self._matcher.is_accepting() and self._newest() == self._only_ends

    @property
    def error(self) -> str:
        """Why it can go on no more; "" while all is well."""
        return self._error

    def _newest(self) -> Mask:
        """The mask of the newest token's row."""
        if self._mask is None:
            self._mask = self._nothing if self._error else self._allowed()
            if self._mask == self._nothing and not self._error and not self._matcher.is_accepting():
                self._error = _reason(self._matcher) or _UNSPELLABLE
            elif self._matcher.is_error() and not self._error:
                self._error = _reason(self._matcher)
        return self._mask

    def _allowed(self) -> Mask:
        """The mask of the matcher's state; nothing where it fails."""
        mask = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            return self._nothing
        row = bytearray(mask[: len(self._nothing)])
        if self._vocab % 32:  # the matcher's own end token shares the last word
            row[self._vocab // 8] &= ~(1 << self._vocab % 8)
        return self._with_ends(row) if self._matcher.is_accepting() else bytes(row)

    def _with_ends(self, row: bytearray) -> Mask:
        for token in self._ends:
            row[token // 8] |= 1 << token % 8
        return bytes(row)

    def _walk(self, draft: Draft) -> Iterator[int]:
        """Indices of the draft's tokens that are allowed, parents first; the matcher is in the state after
        each, and in its own again at the end."""
        parents = range(-1, len(draft.tokens) - 1) if draft.parents is None else draft.parents
        children: dict[int, list[int]] = {}
        for i, parent in enumerate(parents):
            children.setdefault(parent, []).append(i)
        path: list[int] = []
        waiting = [] if self._error else [(i, 0) for i in children.get(-1, ())]
        while waiting:
            i, depth = waiting.pop()
            token = draft.tokens[i]
            self._back(path, depth)
            if token not in self._ends and self._matcher.try_consume_tokens([token]) == 1:
                path.append(token)
                yield i
                waiting += [(child, depth + 1) for child in children.get(i, ())]
        self._back(path, 0)

    def _back(self, path: list[int], depth: int) -> None:
        """Cuts the path that was consumed after the newest token to so many tokens."""
        more, path[depth:] = len(path) - depth, []
        if (self._matcher.is_error() and not self._error) or not self._matcher.rollback(more):
            # A matcher that failed somewhere in a draft stays so, but the draft may never come true.
            self._matcher = self._start.deep_copy()
            self._matcher.consume_tokens([*self._history, *path])


def _reason(matcher: LLMatcher) -> str:
    """Why a matcher failed, in one line."""
    line = (matcher.get_error().splitlines() or [""])[0]
    return _UNSPELLABLE if line.startswith("NoExtension") else line[:200]
