"""Small programs of random weights, whose instructions are timed: what efficiencies are measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from gossamer import _native
from gossamer.backends.cpu.lower import Instruction
from gossamer.backends.cpu.program import CpuProgram, StepShape
from gossamer.checkpoint.sparsity import with_nonzeros
from gossamer.checkpoint.weights import DummySource
from gossamer.config import EngineConfig, MixedPrecision, Quantization, SparseWeights
from gossamer.graph.families import build_graph
from gossamer.graph.ir import Graph
from gossamer.passes.pipeline import run_passes
from gossamer.planner.efficiencies import ROWS

__all__ = ["SHAPE", "Sample", "SmallProgram", "layer_bytes", "small_graph", "stored_format"]

SHAPE = {"hidden": 512, "inner": 1536, "heads": 8, "kv_heads": 2, "head_dim": 64, "vocab": 4096}
_REPEATS = 15


@dataclass(frozen=True, slots=True)
class Sample:
    """One instruction in one kind of step. rows: of a call; seconds: of a call."""

    instruction: Instruction
    rows: int
    seconds: float


class SmallProgram:
    """A program over random weights and the steps that time its instructions."""

    def __init__(self, graph: Graph, kv_dtype: str, isa: str, pool: _native.Pool, table: int = 8) -> None:
        self.graph = graph
        self._table = table
        self.program = CpuProgram(
            graph,
            DummySource(graph, "0.5" if any(w.sparse for w in graph.weights.values()) else None),
            StepShape(
                tokens=ROWS[-1], rows=64, spans=64, page_size=16, pages=64 * table, table=table,
                kv_dtype=kv_dtype,
            ),
            isa=isa,
            threads=0,
            pool=pool,
        )  # fmt: skip

    def times(self, spans: Sequence[tuple[int, int]], repeats: int = _REPEATS) -> list[Sample]:
        """Of every instruction that runs in a step. spans: (tokens before, tokens in it) of each sequence,
        all of which sample their last."""
        self._fill(spans)
        tokens = sum(new for _, new in spans)
        taken = []
        before = self.program.program.receipt()
        for i in range(repeats + 2):
            self.program.run(tokens, len(spans), len(spans), len(spans) * self._table, top1=True)
            after = self.program.program.receipt()
            if i >= 2:
                taken.append(
                    [(b[1] - a[1]) / max(1, b[0] - a[0]) for a, b in zip(before, after, strict=True)]
                )
            calls = [(b[0] - a[0], b[2] - a[2]) for a, b in zip(before, after, strict=True)]
            before = after
        typical = np.median(np.asarray(taken), axis=0)
        instructions = self.program._instructions
        return [
            Sample(instruction, rows // count, float(ns) * 1e-9)
            for instruction, ns, (count, rows) in zip(instructions, typical, calls, strict=True)
            if count
        ]

    def _fill(self, spans: Sequence[tuple[int, int]]) -> None:
        p, row = self.program, 0
        for i, (before, new) in enumerate(spans):
            p.spans[i] = (row, new, before, i * self._table, -1)
            p.positions[row : row + new] = range(before, before + new)
            p.ids[row : row + new] = 7
            p.rows[i] = row + new - 1
            row += new
            for group in range(len(self.graph.kv_groups)):
                start = group * len(spans) * self._table + i * self._table
                p.tables[start : start + self._table] = range(i * self._table, (i + 1) * self._table)
        p.sample_rows[: len(spans)]["temperature"] = 0.0


def layer_bytes(program: CpuProgram) -> int:
    return sum(size for (name, _), size in program._place_bytes.items() if name.startswith("layers."))


def small_graph(
    stored: str, layers: int, *, fused: bool = True, heads: int | None = None, kv_heads: int | None = None
) -> Graph:
    """A small Llama with every matrix in one format."""
    sparse = stored.endswith("-sparse")
    name = stored.removesuffix("-sparse")
    config = EngineConfig(
        model="calibration",
        load_format="dummy",
        dummy_sparsity="0.5" if sparse else None,
        sparse_weights=SparseWeights() if sparse else None,
        quantization=None if name in ("f32", "f16", "bf16") else Quantization.parse(name),
        mixed_precision={"f16": MixedPrecision(dtype="f16"), "bf16": MixedPrecision(dtype="bf16")}.get(name),
    )  # fmt: skip
    if not fused:
        config = replace(config, operator_fusion=None, layer_fusion=None)
    graph = build_graph(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": SHAPE["hidden"],
            "intermediate_size": SHAPE["inner"],
            "num_hidden_layers": layers,
            "num_attention_heads": heads or SHAPE["heads"],
            "num_key_value_heads": kv_heads or SHAPE["kv_heads"],
            "head_dim": SHAPE["head_dim"],
            "vocab_size": SHAPE["vocab"],
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e4,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
        },
        name=f"calibration-{layers}",
    )
    if sparse:
        graph = with_nonzeros(graph, DummySource(graph, "0.5"), count=True)
    return run_passes(graph, config)[0]


def stored_format(graph: Graph) -> str:
    return next(w.stored for w in graph.weights.values() if len(w.shape) == 2)
