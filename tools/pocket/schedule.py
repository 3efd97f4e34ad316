"""Warm-up, constant, decay: a learning rate that ends well whenever the run has to end.

The end is a time, not a step count, because the machine's speed is not known in advance (shared cores,
pauses). Progress through the decay advances by tokens, each weighed by how many more are expected
before the end, so that a slower or paused machine gets a shorter decay and never an unfinished one.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass


@dataclass(kw_only=True, slots=True)
class Schedule:
    """The factor on the peak learning rate; its state goes into the checkpoint."""

    warmup_tokens: int
    decay_share: float = 0.25  # of all the tokens the run will see
    least_decay_steps: int = 100  # the decay takes so many steps even when the deadline is behind
    decay_progress: float | None = None  # None until the decay has begun; 1 when it is over
    decay_steps: int = 0

    def due(self, *, tokens_seen: int, tokens_expected: float) -> bool:
        """Whether the decay should begin, with `tokens_expected` still to come before the end."""
        return tokens_expected <= self.decay_share * (tokens_seen + tokens_expected)

    def begin_decay(self) -> None:
        """Starts the decay, unless it runs already."""
        if self.decay_progress is None:
            self.decay_progress = 0.0

    def advance(self, *, step_tokens: int, tokens_expected: float) -> None:
        """Moves the decay by one step of `step_tokens`; does nothing before the decay."""
        if self.decay_progress is None:
            return
        steps_left = max(tokens_expected / step_tokens, self.least_decay_steps - self.decay_steps, 1.0)
        self.decay_progress = min(1.0, self.decay_progress + (1.0 - self.decay_progress) / steps_left)
        self.decay_steps += 1

    def factor(self, tokens_seen: int) -> float:
        """Linear warm-up, then 1, then `1 - sqrt(progress)` (Hägele et al. 2024)."""
        warm = min(1.0, (tokens_seen + 1) / self.warmup_tokens)
        return warm if self.decay_progress is None else warm * (1.0 - math.sqrt(self.decay_progress))

    @property
    def finished(self) -> bool:
        """Whether the decay is over."""
        return self.decay_progress is not None and self.decay_progress >= 1.0 - 1e-9

    def state(self) -> dict[str, float | int | None]:
        """For the checkpoint; `Schedule(**state)` restores it."""
        return asdict(self)
