"""What a step of a recipe gets, gives and promises; `run.py` is the life cycle around it.

A step takes a model's directory and fills another. It keeps what would be dear to lose (blocks that are done,
optimizer states) in a scratch directory that outlives an interruption, so that started again it goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gossamer.graph.ir import Graph

__all__ = ["Estimate", "Job", "StepRunner", "Stopped"]

Ids = npt.NDArray[np.int32]


class Stopped(Exception):
    """Raised by a step whose job was asked to stop: what is done lies in its scratch directory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a step will take, roughly: seconds, bytes of memory at the peak and of disk beside the result."""

    seconds: float
    memory: int
    disk: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One step at work.

    model: the directory of the step's model (config.json, safetensors, tokenizer); original: of the model
    that the recipe began with; out: an empty directory to fill, renamed by the caller once it is whole;
    scratch: an existing directory for what should outlive an interruption, removed by the caller after the
    step; text: the recipe's tokens (empty where it names none); context: tokens of a calibration window;
    samples: how many windows calibration takes; seed: of all chance.
    """

    model: Path
    original: Path
    out: Path
    scratch: Path
    text: Ids
    context: int
    samples: int
    seed: int
    threads: int
    progress: Callable[[str, int, int], None] = field(default=lambda what, done, total: None)
    """(what is being done, how much of it, of how much)."""
    stopping: Callable[[], bool] = field(default=lambda: False)

    def check_stop(self) -> None:
        """Raises Stopped where the user asked for it; called between blocks and optimizer steps."""
        if self.stopping():
            raise Stopped

    def calibration(self) -> Ids:
        """Windows [samples, context], spread evenly over the text. Raises ConfigError for too little."""
        from gossamer.compress.text import spread_windows

        return spread_windows(self.text, self.context, self.samples)


class StepRunner(Protocol):
    """What a module that implements a step exports, as functions of these names."""

    def estimate(self, config: Any, graph: Graph, tokens: int, flops: float) -> Estimate:
        """Before the step runs. tokens: of calibration; flops: what torch does in a second here (a
        multiply-add counts as two)."""

    def run(self, config: Any, job: Job) -> dict[str, Any]:
        """Does it; gives facts for the certificate (JSON values). Raises GossamerError, Stopped."""
