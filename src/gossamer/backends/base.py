"""What every backend says about itself: the memory it takes and the proof of what ran."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from gossamer.graph.ir import Graph

__all__ = ["MemoryReport", "Program", "ReceiptLine"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport:
    """Bytes taken at start; nothing grows past them. kv_tokens: how many tokens the KV pages hold.
    arena_separate, arena_shared: what the arena would be without memory reuse, and with it. draft: all that a
    draft model takes beside. host: of host memory for weights that a GPU does not hold; no part of total,
    which is of the device's."""

    weights: int
    kv: int
    kv_tokens: int
    arena: int
    arena_separate: int
    arena_shared: int
    workspace: int
    draft: int = 0
    host: int = 0

    @property
    def total(self) -> int:
        """All bytes together."""
        return self.weights + self.kv + self.arena + self.workspace + self.draft


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceiptLine:
    """One instruction: which node, by which kernel of which instruction set, how often it ran, over how many
    rows, how many bytes of weights it has, the seconds spent, and their share of those of all instructions.

    gb_s: weight bytes read a second, in 1e9; None where a call reads no weights, or only some of them
    (a lookup, the chosen experts).
    """

    node: str
    kernel: str
    isa: str
    calls: int
    rows: int
    weight_bytes: int
    seconds: float
    share: float
    gb_s: float | None


class Program(ABC):
    """A graph that runs steps. Input arrays are filled in place, then `run` executes the step and fills
    those of results. shape is a StepShape.

    ids, positions [T], rows [R] int32; spans [S, 5] int32 (row, count, start, table offset, 0 for a tree or
    -1); parents [T] int32, of the rows of trees; tables int32 [groups, S, table], flat; sample_rows of dtype
    SAMPLE_ROW. Outputs: token, logprob, top_ids, top_logprobs, bad, one line per row.
    """

    graph: Graph
    shape: Any
    ids: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int32]
    parents: npt.NDArray[np.int32]
    rows: npt.NDArray[np.int32]
    spans: npt.NDArray[np.int32]
    tables: npt.NDArray[np.int32]
    sample_rows: npt.NDArray[np.void]
    token: npt.NDArray[np.int32]
    logprob: npt.NDArray[np.float32]
    top_ids: npt.NDArray[np.int32]
    top_logprobs: npt.NDArray[np.float32]
    bad: npt.NDArray[np.uint8]

    @abstractmethod
    def bind_sampling(
        self,
        history: npt.NDArray[np.int32],
        bias_ids: npt.NDArray[np.int32],
        bias_values: npt.NDArray[np.float32],
        masks: npt.NDArray[np.int32],
    ) -> None:
        """Points the sampler at this step's token histories, biases and masks."""

    @abstractmethod
    def run(
        self,
        tokens: int,
        spans: int,
        rows: int,
        table_stride: int,
        *,
        sample: bool = True,
        top1: bool = False,
    ) -> float:
        """One step; gives the seconds spent inside."""

    @abstractmethod
    def value(self, name: str, rows: int) -> npt.NDArray[np.float32]:
        """An output ("logits", ...) after a step, [rows, width]; valid until the next one."""

    @abstractmethod
    def copy_tokens(
        self, group: int, source: int, source_slot: int, target: int, target_slot: int, tokens: int
    ) -> None:
        """Copies tokens from page to page, in every layer of a KV group."""
