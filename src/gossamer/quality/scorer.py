"""Logits of windows of tokens, from whatever runs the model: the kernels that serve it, or torch.

A step computes as many windows, or parts of them, as its tokens and logits have room for. On the kernels a
token's logits do not depend on what else is in the step, so that they are those of serving, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from gossamer.backends.base import ReceiptLine
from gossamer.backends.cpu.formats import kv_page_bytes
from gossamer.backends.cpu.packing import Progress
from gossamer.config import EngineConfig
from gossamer.engine.step import Executor, Span, StepPlan
from gossamer.errors import CheckpointError, ConfigError
from gossamer.graph.ir import Graph
from gossamer.graph.weights import stored_format
from gossamer.passes.weight_formats import matrices
from gossamer.quality.report import Execution
from gossamer.quality.windows import Window
from gossamer.runtime.start import Started, load_graph, start

__all__ = ["Chunk", "ModelScorer", "Scorer", "open_scorer"]

_LOGITS = 64 << 20  # bytes of a step's logits
_TOKENS = 512  # of a step
_LEAST_ROWS = 16


@dataclass(frozen=True, slots=True)
class Chunk:
    """Logits [R, V] of a step's rows, valid until the next; targets [R]: the tokens that they predict;
    windows [R]: the index of the window that each row is of."""

    logits: npt.NDArray[np.float32]
    targets: npt.NDArray[np.int32]
    windows: npt.NDArray[np.int32]


class Scorer(Protocol):
    """Gives logits of windows. context: most ids of a window; two scorers of one vocabulary and context cut
    the same windows into the same chunks."""

    @property
    def vocab(self) -> int: ...

    @property
    def context(self) -> int: ...

    def logits(self, windows: Sequence[Window]) -> Iterator[Chunk]:
        """All rows that predict something, in the order of the windows. Raises CheckpointError for NaN."""


class _LogitsExecutor(Executor, Protocol):
    def logits(self, plan: StepPlan) -> npt.NDArray[np.float32]: ...


@dataclass
class _Step:
    """What has been put into the next step. pages: of windows that it completes."""

    spans: list[Span] = field(default_factory=list)
    targets: list[npt.NDArray[np.int32]] = field(default_factory=list)
    windows: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    tokens: int = 0


class ModelScorer:
    """A model that was started for scoring; see `open_scorer`."""

    def __init__(self, started: Started, executor: _LogitsExecutor) -> None:
        self.started = started
        self.executor = executor
        self.vocab = executor.limits.vocab
        self.context = executor.limits.max_model_len

    def logits(self, windows: Sequence[Window]) -> Iterator[Chunk]:
        """As in `Scorer`. Raises ConfigError for a window that is longer than the context."""
        limits = self.executor.limits
        free = list(range(min(limits.pages)))
        step = _Step()
        for index, window in enumerate(windows):
            length, silent = len(window.ids), len(window.ids) - len(window.targets)
            if length > self.context:
                raise ConfigError(f"a window of {length} tokens is beyond the {self.context} that are scored")
            need = -(-length // limits.page_size)
            if len(free) < need:
                yield from self._run(step, free)
                step = _Step()
            table = [free.pop() for _ in range(need)]
            at = 0
            while at < length:
                count = min(length - at, limits.max_tokens - step.tokens)
                first = max(0, silent - at)  # of the span's tokens the first that predicts something
                count = min(count, first + limits.max_rows - len(step.windows))
                if count <= 0 or len(step.spans) == limits.max_spans:
                    yield from self._run(step, free)
                    step = _Step()
                    continue
                rows = tuple(range(first, count))
                ids = window.ids[at : at + count].tolist()
                step.spans.append(Span(index, ids, at, rows, (table,) * len(limits.pages)))
                step.targets.append(window.targets[max(0, at - silent) :][: len(rows)])
                step.windows += [index] * len(rows)
                step.tokens += count
                at += count
            step.pages += table
        yield from self._run(step, free)

    def execution(self) -> Execution:
        """What ran, and how."""
        s = self.started
        kernels = {line.kernel for line in self.receipt() if line.calls}
        stored = {stored_format(weight.expr)[0] for weight in matrices(s.graph).values()} - {"f32"}
        return Execution(
            model=s.config.model,
            backend=s.config.backend,
            isa=s.isa,
            formats=_formats(s.graph),
            kv=s.config.kv_dtype,
            kernels=tuple(sorted(kernels)),
            stored=tuple(sorted(stored)),
        )

    def receipt(self) -> list[ReceiptLine]:
        """The native backend's; empty on the reference."""
        return self.started.receipt()

    def close(self) -> None:
        """Gives memory and threads back."""
        self.executor.close()

    def _run(self, step: _Step, free: list[int]) -> Iterator[Chunk]:
        if not step.spans:
            return
        logits = self.executor.logits(StepPlan(tuple(step.spans)))
        free.extend(step.pages)
        if not step.windows:
            return
        if not np.isfinite(logits.max(axis=1)).all():  # of NaN the maximum is NaN
            raise CheckpointError(
                f"{self.started.config.model} computed NaN or infinity: its weights are damaged, or the "
                "storage format cannot hold its values (try --dtype float32)"
            )
        yield Chunk(logits, np.concatenate(step.targets), np.asarray(step.windows, np.int32))


def open_scorer(config: EngineConfig, context: int, progress: Progress | None = None) -> ModelScorer:
    """Starts a model for windows of `context` tokens; batches, KV memory and speculation of the configuration
    are replaced by what scoring takes.

    Raises GossamerError for anything a user can mend, memory that is not there included.
    """
    graph, _, _ = load_graph(replace(config, max_model_len=None))
    if context > graph.reach:
        raise ConfigError(
            f"a context of {context} tokens is beyond the {graph.reach} positions that {config.model} "
            "serves; lower --context"
        )
    rows = min(max(_LOGITS // (4 * graph.vocab), _LEAST_ROWS), _TOKENS)
    page = 16 if config.paged_attention is None else config.paged_attention.page_size
    if config.paged_attention is None:
        page = -(-context // 16) * 16
    else:
        config = replace(
            config, paged_attention=replace(config.paged_attention, swap_bytes=None, swap_directory=None)
        )
    pages = 2 * -(-context // page) + -(-_TOKENS // page) + 32
    config = replace(
        config,
        speculative_decoding=None,
        dynamic_batching=None,
        max_model_len=context,
        max_num_seqs=rows,
        max_num_batched_tokens=_TOKENS,
        kv_bytes=pages * kv_page_bytes(graph, page, config.kv_dtype),
    )
    started = start(config, progress)
    return ModelScorer(started, started.executor)  # type: ignore[arg-type]


def _formats(graph: Graph) -> dict[str, float]:
    """Formats of the matrices -> their share of all numbers, the largest first."""
    sizes: dict[str, int] = {}
    for weight in matrices(graph).values():
        name = f"{weight.format}-g{weight.group}" if weight.group else weight.format
        sizes[name] = sizes.get(name, 0) + int(np.prod(weight.shape))
    whole = sum(sizes.values())
    return {name: round(sizes[name] / whole, 4) for name in sorted(sizes, key=lambda n: -sizes[n])}
