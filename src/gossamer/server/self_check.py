"""Every hour of serving is compared with its prediction and kept in the machine's history."""

from __future__ import annotations

import logging
import time

from gossamer.bench.prediction import actual_bytes, keep, predictable
from gossamer.engine.engine import Stats
from gossamer.planner.efficiencies import current_efficiencies
from gossamer.planner.history import newest_rates
from gossamer.planner.roofline import StepModel
from gossamer.runtime.start import Started

__all__ = ["SelfCheck"]

logger = logging.getLogger("gossamer.server")
_EVERY = 3600.0  # seconds
_FEW = 50  # decode steps below which there is nothing to compare


class SelfCheck:
    """Adds up the steps in which nothing but decoding happened. The engine's thread alone uses it.

    No probe runs beside serving: the newest one in the history counts (`gossamer bench`, `ablate` and `plan`
    leave some), and without any nothing is compared. What is kept is for the error history; no efficiency is
    fitted from it, since nobody knows what else ran.
    """

    def __init__(self, started: Started) -> None:
        self._started = started
        self._since = time.monotonic()
        self._steps = 0
        self._seconds = self._sequences = self._tokens = 0.0

    def note(self, seconds: float, before: Stats, after: Stats) -> None:
        """One step took so long. before, after: the engine's counters around it."""
        running = before.running
        if running and after.computed_tokens - before.computed_tokens == running == after.running:
            self._steps += 1
            self._seconds += seconds
            self._sequences += running
            self._tokens += after.kv_usage * after.kv_filled * self._started.memory.kv_tokens
        if time.monotonic() - self._since >= _EVERY:
            self.keep()

    def keep(self) -> bool:
        """Compares and keeps what was noted, and begins anew. False where there was too little, or nothing
        to compare with; it never raises."""
        steps, seconds, sequences, tokens = self._steps, self._seconds, self._sequences, self._tokens
        self._since = time.monotonic()
        self._steps = 0
        self._seconds = self._sequences = self._tokens = 0.0
        started = self._started
        if steps < _FEW or not predictable(started):
            return False
        try:
            rates = newest_rates(started.isa, started.threads)
            if rates is None:
                return False
            running = max(1, round(sequences / steps))
            context = round(tokens / max(1.0, sequences))
            model = StepModel(started.graph, started.config, rates, current_efficiencies())
            step = model.seconds([(running, context, 1)], running)
            return keep(
                "serving",
                started,
                {"decode_steps": steps, "sequences": running, "context": context},
                rates,
                {"itl_ms": 1e3 * step, "decode_tokens_per_s": running / step},
                {
                    **actual_bytes(),
                    "itl_ms": 1e3 * seconds / steps,
                    "decode_tokens_per_s": sequences / seconds,
                },
                cpu_share=None,
                spread=None,
            )
        except Exception:  # what serves must not fail for what is compared
            logger.exception("the last hour could not be compared with its prediction")
            return False
