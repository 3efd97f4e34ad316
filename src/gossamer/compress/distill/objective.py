"""What a step of training minimises: losses with their weights, over one batch of windows."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from gossamer.compress.distill.losses import IGNORED, cross_entropy, divergence, row_by_row
from gossamer.compress.distill.matching import Matching
from gossamer.compress.distill.teacher import Teacher

__all__ = ["Objective"]

Ids = npt.NDArray[np.int32]


class Objective(nn.Module):
    """Cross entropy on the text, divergence from a teacher, distances to its values. Its parameters are the
    projections, trained along with the student."""

    def __init__(
        self,
        *,
        ce: float = 0.0,
        kind: str | None = None,
        temperature: float = 1.0,
        teacher: Teacher | None = None,
        matching: Mapping[str, tuple[float, Matching]] | None = None,
    ) -> None:
        """kind: the divergence, of weight 1 (None: none); matching: name -> (weight, pairs)."""
        super().__init__()
        self.ce, self.kind, self.temperature, self.teacher = ce, kind, temperature, teacher
        self.weights = {name: weight for name, (weight, _) in (matching or {}).items()}
        self.matching = nn.ModuleDict({name: pairs for name, (_, pairs) in (matching or {}).items()})

    @property
    def taps(self) -> tuple[str, ...]:
        """Values of the student that it reads."""
        pairs = (pair for matching in self.matching.values() for pair in matching.pairs)  # type: ignore[union-attr]
        return tuple(dict.fromkeys(own for own, _ in pairs))

    def forward(
        self, position: int, ids_BL: Ids, out: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss [] of windows position, ... for what the student gives (`Forward`), and its parts in nats
        per token (distances: relative)."""
        batch, length = ids_BL.shape
        next_ = np.full((batch, length), IGNORED, np.int64)
        next_[:, :-1] = ids_BL[:, 1:]
        targets = torch.from_numpy(next_).flatten()
        lesson = None if self.teacher is None else self.teacher.lesson(position, ids_BL)
        kind = self.kind
        # Every token is predicted by the teacher, all but the last of a window by the text.
        weights = torch.tensor([self.ce / (batch * (length - 1)), 1.0 / (batch * length)])

        def judge(logits: Tensor, rows: slice) -> Tensor:
            log_q = logits.log_softmax(-1)
            entropy = cross_entropy(log_q, targets[rows])
            if kind is None or lesson is None:
                return torch.stack((entropy, torch.zeros(())))
            if self.temperature != 1.0:
                log_q = (logits / self.temperature).log_softmax(-1)
            apart = divergence(kind, log_q, lesson.target.rows(rows), self.temperature)
            return torch.stack((entropy, apart))

        total, sums = row_by_row(out["logits"], judge, weights)
        parts = {"ce": float(sums[0]) / (batch * (length - 1))}
        if kind is not None:
            parts[kind] = float(sums[1]) / (batch * length)
        for name, matching in self.matching.items():
            assert lesson is not None
            distance = matching(out, lesson.taps)
            total = total + self.weights[name] * distance
            parts[name] = float(distance.detach())
        return total, parts
