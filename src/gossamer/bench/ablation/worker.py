"""One engine in a process of its own, so that its memory is its own: `python -m` runs this for `sides.py`.

Protocol: pickled messages, a request and a reply each, over standard input and output. The process ends when
its input does. Ctrl-C is the other side's matter.
"""

from __future__ import annotations

import gc
import logging
import os
import pickle
import signal
import sys
import traceback
from dataclasses import dataclass
from typing import Any, BinaryIO

import psutil

from gossamer.backends.base import MemoryReport, ReceiptLine
from gossamer.bench.ablation.mix import Measured, Work, measure_work
from gossamer.config import EngineConfig
from gossamer.errors import GossamerError
from gossamer.runtime.start import Started, start

__all__ = ["Begin", "Broken", "Run", "State", "anonymous_bytes"]


@dataclass(frozen=True, slots=True)
class Begin:
    """Start an engine; the reply is its State."""

    config: EngineConfig


@dataclass(frozen=True, slots=True)
class Run:
    """Do the work once; the reply is (Measured, State)."""

    work: Work
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What an engine says of itself. resident: anonymous memory of its process, in bytes; units: of layer
    fusion; pages, page_tokens: of the first KV group."""

    memory: MemoryReport
    resident: int
    isa: str
    threads: int
    units: int
    pages: int
    page_tokens: int
    receipt: tuple[ReceiptLine, ...]


@dataclass(frozen=True, slots=True)
class Broken:
    """A reply to what failed. kind: the class of an error that a user can mend, "" for one of ours; text:
    its message, or our traceback."""

    kind: str
    text: str


def anonymous_bytes() -> int:
    """What this process holds that no file stands behind; all it holds, where the system does not say."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("RssAnon:"):
                    return int(line.split()[1]) << 10
    except OSError:
        pass
    return int(psutil.Process().memory_info().rss)


def _state(started: Started) -> State:
    limits = started.executor.limits
    return State(
        memory=started.memory,
        resident=anonymous_bytes(),
        isa=started.isa,
        threads=started.threads,
        units=len(started.graph.units),
        pages=limits.pages[0],
        page_tokens=limits.page_size,
        receipt=tuple(started.receipt()),
    )


def _answer(request: Begin | Run, started: Started | None) -> tuple[Any, Started | None]:
    if isinstance(request, Begin):
        started = start(request.config)
        return _state(started), started
    assert started is not None
    measured: Measured = measure_work(started, request.work, request.seed)
    gc.collect()  # engines refer to themselves, and the next one would stand beside this one
    return (measured, _state(started)), started


def _serve(requests: BinaryIO, replies: BinaryIO) -> None:
    started: Started | None = None
    while True:
        try:
            request = pickle.load(requests)
        except EOFError:
            return
        reply: Any
        try:
            reply, started = _answer(request, started)
        except GossamerError as error:
            reply = Broken(type(error).__name__, str(error))
        except Exception:
            reply = Broken("", traceback.format_exc())
        pickle.dump(reply, replies)
        replies.flush()


def main() -> None:
    """Serves until the input ends; what else is printed goes to standard error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.getLogger("gossamer").setLevel(logging.ERROR)  # whoever asked has heard the notes already
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    _serve(sys.stdin.buffer, replies)


if __name__ == "__main__":
    main()
