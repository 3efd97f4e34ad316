"""Engines in processes of their own, kept for a while: two arms often share a side."""

from __future__ import annotations

import pickle
import subprocess
import sys
from typing import Any

from gossamer.bench.ablation.mix import Measured, Work
from gossamer.bench.ablation.worker import Begin, Broken, Keep, Run, State
from gossamer.config import EngineConfig
from gossamer.errors import ConfigError, MemoryBudgetError

__all__ = ["Pool", "Worker", "WorkerError"]

_KEPT = 3


class WorkerError(Exception):
    """A process that died, or an error of ours in it (with its traceback)."""


class Worker:
    """An engine of one configuration. state: as it last said."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        # -m: the module's classes must have the same names on both sides of the pipe.
        code = "from gossamer.bench.ablation.worker import main; main()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            process_group=0,  # Ctrl-C is for the ablation, which ends its workers
        )
        try:
            self.state: State = self._ask(Begin(config))
        except BaseException:
            self.close()
            raise

    def run(self, work: Work, seed: int) -> Measured:
        """One round."""
        measured, self.state = self._ask(Run(work, seed))
        assert isinstance(measured, Measured)
        return measured

    def keep(self, kept: Keep) -> bool:
        """Adds a prediction and what came to the history; False where nothing is predicted."""
        return bool(self._ask(kept))

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def _ask(self, request: Begin | Keep | Run) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            pickle.dump(request, self._process.stdin)
            self._process.stdin.flush()
            reply = pickle.load(self._process.stdout)
        except (EOFError, OSError):
            code = self._process.wait()
            why = f"signal {-code}; memory ran out, perhaps" if code < 0 else f"exit code {code}"
            raise WorkerError(f"the engine's process ended by itself ({why})") from None
        if isinstance(reply, Broken):
            if not reply.kind:
                raise WorkerError(reply.text)
            raise (MemoryBudgetError if reply.kind == "MemoryBudgetError" else ConfigError)(reply.text)
        return reply


class Pool:
    """The newest few workers. A context: leaving it ends them all."""

    def __init__(self, kept: int = _KEPT) -> None:
        self._kept = kept
        self._workers: list[Worker] = []  # the longest unused first

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def clear(self) -> None:
        """Ends them all."""
        while self._workers:
            self._workers.pop().close()

    def get(self, config: EngineConfig, *, beside: Worker | None = None) -> Worker:
        """A worker of this configuration; `beside` lives on, whoever else has to go. Raises GossamerError."""
        for worker in self._workers:
            if worker.config == config and worker is not beside:
                self._workers.remove(worker)
                self._workers.append(worker)
                return worker
        while len(self._workers) >= self._kept:
            self._drop(beside)
        fresh = self._start(config, beside)
        self._workers.append(fresh)
        return fresh

    def once(self, config: EngineConfig) -> Worker:
        """A fresh worker that the caller closes: what it holds is of one start. Raises GossamerError."""
        return self._start(config, None)

    def _start(self, config: EngineConfig, beside: Worker | None) -> Worker:
        try:
            return Worker(config)
        except MemoryBudgetError:  # idle ones may hold what is missing
            for worker in [w for w in self._workers if w is not beside]:
                self.discard(worker)
            return Worker(config)

    def discard(self, worker: Worker) -> None:
        """Ends one that cannot be used any more."""
        if worker in self._workers:
            self._workers.remove(worker)
        worker.close()

    def _drop(self, beside: Worker | None) -> None:
        oldest = next(w for w in self._workers if w is not beside)
        self._workers.remove(oldest)
        oldest.close()
