"""A peer whose formats are the ways in which a peer can behave."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.contract import Format, Limits, Peer, PeerError, Timing


class _Session:
    def __init__(self, format: str) -> None:
        self.format = format

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Timing:
        if self.format == "raises":
            raise PeerError("the weights are upside down")
        if self.format == "dies":
            print("about to die", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if self.format == "hangs":
            time.sleep(60)
        print("a library that prints {as it likes}")
        return Timing(0.5, 2.0, (new_tokens - 1) * len(prompts))


def _prepare(checkpoint: Path, target: Path, format: str) -> None:
    if format == "unprepared":
        raise PeerError("no exporter for this shape")


def _load(target: Path, format: str, limits: Limits) -> _Session:
    assert target.is_dir() and limits.threads == 1
    return _Session(format)


PEER = Peer(
    name="Fake",
    requirements=(),
    formats=tuple(Format(name, 4) for name in ("works", "raises", "dies", "hangs", "unprepared")),
    prepare=_prepare,
    load=_load,
    run_env={"FAKE_THREADS": "{threads}"},
)
