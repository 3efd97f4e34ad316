"""What a teacher says about windows of text: computed at every step, or read from disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gossamer.backends.reference import ReferenceModel
from gossamer.compress.distill.forward import Forward
from gossamer.compress.distill.losses import FullTarget, Target

__all__ = ["Lesson", "LiveTeacher", "Teacher"]

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Lesson:
    """Predictions for B * L tokens, and values of the teacher's graph by name [B * L, ...]."""

    target: Target
    taps: Mapping[str, Tensor]


class Teacher(Protocol):
    """Where lessons come from."""

    def lesson(self, position: int, ids_BL: Ids) -> Lesson:
        """Of windows position, position + 1, ... of the text, whose tokens are given as well."""


class LiveTeacher:
    """A model that runs at every step. bf16: its matrix products are in bfloat16."""

    def __init__(self, model: ReferenceModel, taps: tuple[str, ...] = (), *, bf16: bool) -> None:
        self._forward = Forward(model.requires_grad_(False), taps)
        self._bf16 = bf16

    @torch.no_grad()
    def lesson(self, position: int, ids_BL: Ids) -> Lesson:
        """As Teacher's."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self._bf16):
            out = self._forward(torch.from_numpy(ids_BL.astype(np.int64)))
        return Lesson(FullTarget(out.pop("logits")), out)
