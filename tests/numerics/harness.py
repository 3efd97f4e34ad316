"""One op as a whole graph, run by the CPU backend and by the reference on the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch

from gossamer import _native
from gossamer.backends.cpu.program import CpuProgram, StepShape
from gossamer.backends.reference.module import ReferenceModel
from gossamer.checkpoint.codes import Floats
from gossamer.graph.builder import Builder
from gossamer.graph.ir import Graph, KVGroup
from gossamer.graph.ops.attention import KVState, SpanRows
from gossamer.graph.weights import Tensor

ISAS = _native.isas()


class Arrays(Floats):
    """A checkpoint of plain arrays."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.arrays = dict(arrays)

    def read(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return self.arrays[name][start:stop]

    def release(self, name: str) -> None:
        """Nothing to let go."""

    def content_key(self) -> str:
        return "arrays"


class OpGraph:
    """Collects inputs (each a table that `embed` reads by token id) and weights of one op under test."""

    def __init__(self) -> None:
        self.builder = Builder("op", "test")
        self.arrays: dict[str, np.ndarray] = {}

    def input(self, name: str, rows: np.ndarray) -> str:
        """A value [T, width] whose row t is rows[t]."""
        return self.builder.op(
            "embed", "ids", weights=(self.weight(name, rows),), scale=1.0, out=f"{name}_in"
        )

    def weight(self, name: str, array: np.ndarray) -> str:
        self.arrays[name] = np.ascontiguousarray(array, np.float32)
        return self.builder.weight(name, Tensor(name, array.shape))

    def finish(
        self,
        value: str,
        kv: tuple[KVGroup, ...] = (),
        formats: Mapping[str, tuple[str, int]] | None = None,
        vocab: int = 16,
    ) -> Graph:
        graph = self.builder.finish(
            outputs={"logits": value}, vocab=vocab, hidden=1, layers=1, max_positions=4096, kv_groups=kv
        )
        changed = {n: replace(graph.weights[n], format=f, group=g) for n, (f, g) in (formats or {}).items()}
        return replace(graph, weights={**graph.weights, **changed})


def run_cpu(
    graph: Graph,
    arrays: Mapping[str, np.ndarray],
    tokens: int,
    *,
    isa: str,
    threads: int = 2,
    spans: tuple[tuple[int, int, int], ...] = (),
    tables: list[list[int]] | None = None,
    page_size: int = 16,
    pages: int = 8,
    kv_dtype: str = "f32",
    program: CpuProgram | None = None,
) -> np.ndarray:
    """The graph's output for tokens 0..tokens-1. spans: (row, count, start); tables: pages of each."""
    program = program or make_cpu(
        graph, arrays, tokens, isa=isa, threads=threads, page_size=page_size, pages=pages, kv_dtype=kv_dtype
    )
    spans = spans or ((0, tokens, 0),)
    tables = tables or [list(range(pages))]
    width = max(map(len, tables))
    program.ids[:tokens] = np.arange(tokens)
    program.rows[:tokens] = np.arange(tokens)
    stride = len(spans) * width
    for i, (row, count, start) in enumerate(spans):
        program.positions[row : row + count] = np.arange(start, start + count)
        program.spans[i] = (row, count, start, i * width, -1)
        for g in range(len(graph.kv_groups)):
            program.tables[g * stride + i * width : g * stride + i * width + len(tables[i])] = tables[i]
    program.run(tokens, len(spans), tokens, stride, sample=False)
    return program.value("logits", tokens).copy()


def make_cpu(
    graph: Graph,
    arrays: Mapping[str, np.ndarray],
    tokens: int,
    *,
    isa: str,
    threads: int = 2,
    page_size: int = 16,
    pages: int = 8,
    kv_dtype: str = "f32",
    flash: bool = True,
) -> CpuProgram:
    """The graph compiled for steps of at most `tokens` tokens."""
    most = max(tokens, 1)
    shape = StepShape(
        tokens=most,
        rows=most,
        spans=most,
        page_size=page_size,
        pages=pages,
        table=pages,
        kv_dtype=kv_dtype,
    )
    return CpuProgram(graph, Arrays(arrays), shape, isa=isa, threads=threads, flash=flash)


def run_reference(
    graph: Graph,
    arrays: Mapping[str, np.ndarray],
    tokens: int,
    *,
    spans: tuple[tuple[int, int, int], ...] = (),
    cache: Callable[[], dict] | None = None,
    kv_dtype: str = "f32",
) -> np.ndarray:
    """The same in torch, float32 (formats are applied to weights and KV, not to activations)."""
    model = ReferenceModel.load(graph, Arrays(arrays))
    spans = spans or ((0, tokens, 0),)
    rows = tuple(SpanRows(i, row, count, start) for i, (row, count, start) in enumerate(spans))
    positions = torch.cat([torch.arange(start, start + count) for _, count, start in spans])
    ids = torch.arange(tokens)
    with torch.inference_mode():
        out = model(ids, positions, ids, KVState(rows, cache() if cache else None, kv_dtype))
    return out["logits"].numpy()
