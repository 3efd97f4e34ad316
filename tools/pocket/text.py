"""Light cleaning of the books, the same for training and for evaluation."""

from __future__ import annotations

import lzma
import re
from collections.abc import Iterator
from pathlib import Path

END_OF_BOOK = "<|endofbook|>"

_INVISIBLE = re.compile("[\ufeff\u200b\u2060\u00ad\r]")
_ODD_SPACES = re.compile("[\u00a0\u2000-\u200a\u202f\u3000\t]")
_EMPHASIS = re.compile(r"(?<!\w)_+|_+(?!\w)|\*\*")
_HEADING = re.compile(r"^(#+)[ ]{2,}", re.MULTILINE)
_TRAILING = re.compile(r" +$", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n{3,}")


def clean(book: str) -> str:
    """Removes invisible characters, emphasis marks, trailing spaces and runs of blank lines.

    Paragraphs already stand on one line each in this collection, and the lines of verse are its own, so
    no line is joined or split.
    """
    book = _ODD_SPACES.sub(" ", _INVISIBLE.sub("", book))
    book = _HEADING.sub(r"\1 ", _EMPHASIS.sub("", book))
    return _BLANK_LINES.sub("\n\n", _TRAILING.sub("", book)).strip() + "\n"


def training_parts(folder: Path) -> list[Path]:
    """The training files of a books folder, in order.

    Raises:
        FileNotFoundError: if there is none.
    """
    parts = sorted(folder.glob("train-*.txt.xz"))
    if not parts:
        raise FileNotFoundError(f"no train-*.txt.xz in {folder}; --books must name the folder that has them")
    return parts


def books_of(part: Path) -> Iterator[str]:
    """The cleaned books of one training file."""
    with lzma.open(part, "rt", encoding="utf-8") as file:
        for book in file.read().split(END_OF_BOOK):
            if book.strip():
                yield clean(book)
