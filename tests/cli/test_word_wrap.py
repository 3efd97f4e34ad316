"""Lines end between words, however the text is cut into pieces; a pipe gets the text as it is."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from gossamer.cli.word_wrap import WordWrap


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize(
    "text, lines",
    [
        ("Once upon a time there was", ["Once upon", "a time", "there was"]),
        ("ten cells. end", ["ten cells.", "end"]),
        ("a\n\n  b  c", ["a", "", "  b  c"]),
        ("x incomprehensible y", ["x", "incomprehensible y"]),  # the terminal breaks the long one
        ("\tx y", ["        x", "y"]),
        ("日本語日本語", ["日本語日本", "語"]),
        ("end   \nnext", ["end", "next"]),
    ],
)
def test_lines(text: str, lines: list[str], size: int) -> None:
    wrap = WordWrap(10)
    pieces = [wrap.feed(text[i : i + size]) for i in range(0, len(text), size)]
    assert ("".join(pieces) + wrap.flush()).split("\n") == lines


def test_a_pipe_gets_every_piece_at_once() -> None:
    wrap = WordWrap(None)
    assert [wrap.feed("a  b"), wrap.feed("c "), wrap.flush()] == ["a  b", "c ", ""]


@pytest.mark.parametrize("verb", ["generate", "demo"])
def test_on_a_terminal(shared: Path, verb: str) -> None:
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 40))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    command = [sys.executable, "-m", "gossamer", verb, str(shared / "models/stories260K"), "--seed", "1"]
    flags = ["-p", "Once upon a time", "-n", "100", "--temperature", "0"]
    with subprocess.Popen(
        [*command, *flags], stdout=slave, stderr=subprocess.DEVNULL, env=environment | {"TERM": "dumb"}
    ) as process:
        os.close(slave)
        seen = b""
        try:
            while piece := os.read(master, 4096):
                seen += piece
        except OSError:  # how Linux reports that the other side was closed
            pass
    os.close(master)
    assert process.returncode == 0
    lines = seen.decode().replace("\r\n", "\n").split("\n")
    story = lines if verb == "generate" else lines[1:7]
    assert len(story) > 5 and all(len(line) <= 40 for line in story)
    assert " ".join(story).count("there was a little girl named Lily. She loved to play outside") == 1
