"""Text out of tokens as they come, and the end of it at stop strings."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from gossamer.errors import RequestError

__all__ = ["IncrementalDetokenizer", "StopChecker"]

_LONGEST_CHARACTER = 4  # bytes of UTF-8


class TokenBytes(Protocol):
    """The part of a `Tokenizer` that detokenizing needs."""

    special_ids: frozenset[int]
    drops_space: bool

    def token_bytes(self, token: int) -> bytes: ...


class IncrementalDetokenizer:
    """Turns token ids into text one by one; the pieces together are `Tokenizer.decode` of all ids.

    Tokens are bytes, so that nothing is ever decoded twice: a UTF-8 decoder with memory holds back an
    unfinished character (at most 3 bytes). prompt_ids: tokens before the first push; text then continues
    them, so a leading space is kept and a character they left unfinished is finished.
    """

    def __init__(
        self, tokenizer: TokenBytes, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._drop_space = tokenizer.drops_space
        tail = b""
        for token in reversed(prompt_ids):
            if len(tail) >= _LONGEST_CHARACTER:
                break
            if token not in self._skipped:
                tail = tokenizer.token_bytes(token) + tail
        if tail:
            self._decoder.decode(tail)
            self._drop_space = False

    def push(self, token: int) -> str:
        """Text that became certain with this token; "" while a character is unfinished.

        Raises RequestError for a negative id.
        """
        if token in self._skipped:
            return ""
        data = self._tokenizer.token_bytes(token)
        if self._drop_space and data:
            data = data.removeprefix(b" ")
            self._drop_space = False
        return self._decoder.decode(data)

    def finish(self) -> str:
        """What is still held back: U+FFFD for a character that was never finished, else ""."""
        return self._decoder.decode(b"", final=True)


class StopChecker:
    """Ends a text at the first stop string, also where it crosses the borders of pieces.

    The match that ends first wins, and of those the longest, so that the result does not depend on how
    the text was cut into pieces. include_stop: the text keeps the stop string at its end.
    Raises RequestError for an empty stop string.
    """

    def __init__(self, stop: Sequence[str], include_stop: bool = False) -> None:
        if any(not text for text in stop):
            raise RequestError("a stop string is empty; leave it out or give at least one character")
        self._stop = tuple(stop)
        self._include = include_stop
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> tuple[str, bool]:
        """(text that may be shown, whether a stop string was reached). After that: ("", True)."""
        if self.matched is not None:
            return "", True
        text = self._held + text
        hits = [(at + len(stop), -len(stop), stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if hits:
            end, size, self.matched = min(hits)
            self._held = ""
            return text[: end if self._include else end + size], True
        keep = self._may_begin_stop(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def finish(self) -> str:
        """Text held back because it might have begun a stop string; call it when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _may_begin_stop(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stop):
                return size
        return 0
