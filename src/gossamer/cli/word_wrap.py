"""Live text on a terminal: lines end between words. What goes to a pipe or a file stays as it is."""

from __future__ import annotations

import shutil
import sys
from unicodedata import east_asian_width

__all__ = ["WordWrap", "terminal_wrap"]


class WordWrap:
    """Breaks text that comes in pieces into lines of at most `width` cells. A word is held back until it is
    complete; one wider than a line is left to the terminal. width None: nothing is changed."""

    def __init__(self, width: int | None) -> None:
        self._width = width
        self._column = 0
        self._gap = ""  # spaces not yet written: they vanish where the line ends
        self._word = ""

    def feed(self, text: str) -> str:
        """What can be written after this piece."""
        if self._width is None:
            return text
        out = []
        for character in text:
            if not character.isspace():
                wide = east_asian_width(character) in "WF"
                if wide:  # lines of such scripts may end anywhere
                    out.append(self.flush())
                self._word += character
                if wide:
                    out.append(self.flush())
                continue
            out.append(self.flush())
            if character == "\n":
                out.append("\n")
                self._column, self._gap = 0, ""
            elif character == "\t":
                self._gap += " " * (8 - (self._column + len(self._gap)) % 8)
            else:
                self._gap += character
        return "".join(out)

    def flush(self) -> str:
        """The word held back, for text that ends or pauses here."""
        from rich.cells import cell_len

        if not self._word or self._width is None:
            return ""
        wide = cell_len(self._word)
        if self._column and self._column + len(self._gap) + wide > self._width:
            lead, self._column = "\n", 0
        else:
            lead = self._gap
            self._column += len(lead)
        self._column += wide
        if self._column > self._width:
            self._column %= self._width
        done, self._gap, self._word = lead + self._word, "", ""
        return done


def terminal_wrap() -> WordWrap:
    """For standard output as it is now."""
    return WordWrap(shutil.get_terminal_size().columns if sys.stdout.isatty() else None)
