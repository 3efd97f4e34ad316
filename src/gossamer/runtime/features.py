"""From one step's hidden states to the next step's features: what a draft head on the CPU is fed.

Nothing is kept but where each sequence's rows lie: the states stay in their program's arena until its next
step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from gossamer.backends.cpu.program import CpuProgram
from gossamer.engine.step import ProgramName, StepPlan
from gossamer.errors import GraphError
from gossamer.graph.families.eagle import FEATURES, HIDDEN

__all__ = ["Features"]


@dataclass(frozen=True, slots=True)
class _Left:
    """What a program's last step left: how many rows; of each sequence the first row, how many, and the first
    one's slot."""

    rows: int = 0
    places: Mapping[int, tuple[int, int, int]] = field(default_factory=dict)


class Features:
    """Hidden states between a target (whose graph has them among its outputs) and its head."""

    def __init__(self, target: CpuProgram, head: CpuProgram) -> None:
        self._programs: Mapping[ProgramName, CpuProgram] = {"target": target, "draft": head}
        self._left: dict[ProgramName, _Left] = {"target": _Left(), "draft": _Left()}

    def ran(self, plan: StepPlan) -> None:
        """Takes note of a step that has been computed."""
        places, row = {}, 0
        for span in plan.spans:
            places[span.sequence] = row, len(span.tokens), span.start
            row += len(span.tokens)
        self._left[plan.program] = _Left(row, places)

    def fill(self, plan: StepPlan) -> None:
        """Writes the features of a step of the head that is about to run.

        Raises GraphError for a token whose feature is not there.
        """
        left = self._left[plan.features]
        rows: list[int] = []
        for span in plan.spans:
            first, count, _ = left.places.get(span.sequence, (0, 0, 0))
            if len(span.features) != len(span.tokens):
                raise GraphError(
                    f"sequence {span.sequence}: {len(span.features)} features for {len(span.tokens)} tokens"
                )
            if not -1 <= min(span.features) <= max(span.features) < count:
                raise GraphError(
                    f"sequence {span.sequence} takes features {min(span.features)} to {max(span.features)} "
                    f"of the {count} that the last step of {plan.features!r} left it"
                )
            rows += [-1 if offset < 0 else first + offset for offset in span.features]
        index = np.array(rows, np.intp)
        given = self._programs["draft"].input(FEATURES, len(rows))
        if left.rows:  # taken before it is written: of the head's own step both lie in one arena
            given[...] = self._programs[plan.features].value(HIDDEN, left.rows)[index]
        given[index < 0] = 0.0

    def slots(self, sequence: int) -> range:
        """As `HeadExecutor.feature_slots`."""
        _, count, start = self._left["target"].places.get(sequence, (0, 0, 0))
        return range(start, start + count)
