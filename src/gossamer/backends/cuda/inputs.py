"""The arrays of a step on the device: one buffer, filled by one copy, at places that kernels can rely on."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from gossamer.backends.base import Program
from gossamer.backends.cpu.plan import SAMPLE_ROW, StepShape
from gossamer.backends.cuda.lower import Step
from gossamer.backends.cuda.step import Batch
from gossamer.backends.cuda.transfer import host_buffer

__all__ = ["StepInputs"]

_WORDS = SAMPLE_ROW.itemsize // 4
_ALIGN = 4  # words: kernels are compiled for pointers of 16 bytes
_Layout = Mapping[str, tuple[int, int]]


@lru_cache(256)
def _layout(tokens: int, spans: int, rows: int, tree: bool) -> _Layout:
    """Where arrays begin and how many words they have; tables lie behind them."""
    sizes = {
        "ids": tokens,
        "positions": tokens,
        "row_spans": tokens,
        "rows": rows,
        "spans": 5 * spans,
        "sampling": _WORDS * rows,
        "parents": tokens if tree else 1,
        "tables": 0,
    }
    found, at = {}, 0
    for name, size in sizes.items():
        found[name] = at, size
        at += -(-size // _ALIGN) * _ALIGN
    return found


class StepInputs:
    """Takes a program's step arrays to the device. Views of them are valid until the next step's come."""

    def __init__(self, shape: StepShape, groups: int, device: torch.device) -> None:
        self._shape, self._groups, self._device = shape, groups, device
        self._recorded: dict[int, Step] = {}
        self._there = torch.zeros(self.words(shape, groups), dtype=torch.int32, device=device)

    @staticmethod
    def words(shape: StepShape, groups: int) -> int:
        """Of the buffer: what the largest step takes."""
        head = _layout(shape.tokens, shape.spans, shape.rows, True)["tables"][0]
        return head + groups * shape.spans * shape.table

    def fill(
        self, program: Program, tokens: int, spans: int, rows: int, stride: int, bucket: int | None
    ) -> tuple[Step, torch.Tensor]:
        """The step that lies in the program's arrays, and its SAMPLE_ROWs [R, words] as int32. stride: of
        tables from group to group. bucket: fill a decode step up to so many sequences of one token."""
        lines = program.spans[:spans]
        tree = bool((lines[:, 4] >= 0).any())
        layout = _layout(bucket, bucket, bucket, False) if bucket else _layout(tokens, spans, rows, tree)
        head = layout["tables"][0]
        buffer = host_buffer(head + self._groups * stride, self._device)
        here = buffer.numpy()
        self._put(here, layout, program, tokens, spans, rows)
        here[head:] = program.tables[: self._groups * stride]
        apart = bucket * self._shape.table if bucket else stride
        together = head + (self._groups * stride if apart == stride else stride)
        self._there[:together].copy_(buffer[:together], non_blocking=True)
        for group in range(1, self._groups if apart != stride else 1):
            at, source = head + group * apart, head + group * stride
            self._there[at : at + stride].copy_(buffer[source : source + stride], non_blocking=True)
        if bucket:
            step = self.recorded(bucket)
        else:
            slots = int((lines[:, 1] + lines[:, 2]).max())
            step = self._step(
                layout,
                stride,
                most_rows=int(lines[:, 1].max()),
                most_slots=min(slots, stride // spans * self._shape.page_size),
                tree=tree,
            )
        return step, self._view(layout, "sampling").view(-1, _WORDS)

    def recorded(self, bucket: int) -> Step:
        """What every decode step of a bucket looks like: tables, and slots of a sequence, at their most."""
        found = self._recorded.get(bucket)
        if found is None:
            layout = _layout(bucket, bucket, bucket, False)
            slots = self._shape.table * self._shape.page_size
            found = self._recorded[bucket] = self._step(
                layout, bucket * self._shape.table, most_rows=1, most_slots=slots, tree=False
            )
        return found

    @staticmethod
    def _put(
        here: npt.NDArray[np.int32], layout: _Layout, program: Program, tokens: int, spans: int, rows: int
    ) -> None:
        parts = {name: here[at : at + size] for name, (at, size) in layout.items()}
        lines = program.spans[:spans]
        parts["ids"][:tokens], parts["ids"][tokens:] = program.ids[:tokens], 0
        parts["positions"][:tokens], parts["positions"][tokens:] = program.positions[:tokens], 0
        parts["rows"][:rows], parts["rows"][rows:] = program.rows[:rows], 0
        parts["parents"][:] = program.parents[: len(parts["parents"])]
        parts["sampling"][: rows * _WORDS] = program.sample_rows[:rows].view(np.int32)
        parts["spans"][: 5 * spans] = lines.reshape(-1)
        parts["row_spans"][:tokens] = np.repeat(np.arange(spans, dtype=np.int32), lines[:, 1])
        fill = np.arange(spans, len(parts["spans"]) // 5, dtype=np.int32)
        if len(fill):
            rest = parts["spans"][5 * spans :].reshape(-1, 5)
            rest[:] = (0, 0, 0, 0, -1)
            rest[:, 0] = parts["row_spans"][spans:] = fill

    def _step(self, layout: _Layout, stride: int, *, most_rows: int, most_slots: int, tree: bool) -> Step:
        head = layout["tables"][0]
        batch = Batch(
            positions=self._view(layout, "positions"),
            spans=self._view(layout, "spans").view(-1, 5),
            tables=self._there[head : head + self._groups * stride].view(self._groups, stride),
            parents=self._view(layout, "parents"),
            row_spans=self._view(layout, "row_spans"),
            most_rows=most_rows,
            most_slots=most_slots,
            tree=tree,
        )
        return Step(self._view(layout, "ids"), self._view(layout, "rows"), batch)

    def _view(self, layout: _Layout, name: str) -> torch.Tensor:
        at, size = layout[name]
        return self._there[at : at + size]
