"""Measures the efficiencies of this machine: small programs of random weights against the probe beside them.

Two programs for each weight format, one whose weights the caches hold and one whose they do not, run steps of
ever more rows, whose instructions are timed apart (the receipts); of each the median counts. The rates are
then least squares over all layer shapes and numbers of rows, by relative error.
"""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from gossamer import _native
from gossamer.backends.cpu.lower import Instruction
from gossamer.backends.cpu.program import CpuProgram, StepShape
from gossamer.checkpoint.weights import DummySource
from gossamer.config import EngineConfig, MixedPrecision, Quantization, SparseWeights
from gossamer.graph.families import build_graph
from gossamer.graph.ir import Graph
from gossamer.passes.pipeline import run_passes
from gossamer.planner.efficiencies import (
    ROWS,
    SHIPPED,
    AttentionRate,
    Efficiencies,
    LinearRate,
    Table,
    VectorRate,
    peak_of,
)
from gossamer.planner.hardware import Prober, Rates, cache_bytes
from gossamer.planner.roofline import PASSING_GB_S, SOFTNESS, attention_counts, vector_seconds
from gossamer.planner.work import AttentionWork

__all__ = ["FORMATS", "calibrate", "filled", "measure_tables"]

FORMATS = (
    "f32", "f16", "bf16", "int8", "int8-g32", "int4-g32", "int4-g64", "int4-g128", "uint4-g64", "nf4-g64",
    "int8-sparse", "bf16-sparse",
)  # fmt: skip
_KV = ("f32", "f16", "bf16", "int8", "int4")
_CONTEXT = 64  # keys in the steps that time linear layers
_STREAM = 3  # times the last cache: weights of the program that reads them from memory
_MOST_STREAM = 128 << 20
_REPEATS = 15
_PROBE_SECONDS = 0.06
_ATTEMPTS = 3  # at a format, while others take the processors
_LEAST = 0.8  # 1 / the part of a peak that nothing surpasses
_SAME = 1.25  # read rates that differ by less are of one state
_QUIET = 0.93  # of the fastest probe: with less, others took part of them
_SHAPE = {"hidden": 512, "inner": 1536, "heads": 8, "kv_heads": 2, "head_dim": 64, "vocab": 4096}

_T = TypeVar("_T")
Floats = npt.NDArray[np.float64]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class _Sample:
    """One instruction in one kind of step. rows: of a call; seconds: of a call."""

    instruction: Instruction
    rows: int
    seconds: float


class _Bench:
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

    def times(self, spans: Sequence[tuple[int, int]], repeats: int = _REPEATS) -> list[_Sample]:
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
            _Sample(instruction, rows // count, float(ns) * 1e-9)
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


@dataclass(slots=True)
class _State:
    """What was measured while the machine read at about one rate."""

    reads: list[float] = field(default_factory=list)
    linear: dict[str, LinearRate] = field(default_factory=dict)
    vector: dict[str, list[tuple[float, float, float]]] = field(default_factory=lambda: defaultdict(list))
    attention: dict[str, AttentionRate] = field(default_factory=dict)


def calibrate(
    isas: Sequence[str] | None = None,
    threads: Sequence[int | None] = (None,),
    progress: Progress | None = None,
) -> Efficiencies:
    """Efficiencies of this machine: of the best instruction set, or of those asked for (under a minute each),
    on so many threads (None: one per processor). progress(done, in all) counts programs. Python's part is
    the shipped one: what measures it needs an engine (bench/calibration.py).

    Raises ConfigError for an instruction set that this machine lacks.
    """
    wanted = [(isa, n) for isa in isas or (str(_native.best_isa()),) for n in threads]
    each = len(FORMATS) + len(_KV) + 1
    tables: dict[str, tuple[Table, ...]] = {}
    for i, (isa, n) in enumerate(wanted):
        done = (lambda d, _, i=i: progress(i * each + d, len(wanted) * each)) if progress else None
        tables[isa] = tables.get(isa, ()) + tuple(filled(measure_tables(isa, n, done)))
    return replace(SHIPPED, tables=tables, single_read=_single_read(wanted[0][0]), origin="measured here")


def measure_tables(isa: str, threads: int | None = None, progress: Progress | None = None) -> list[Table]:
    """A table for each state in which the machine was met, each with what was measured then."""
    prober = Prober(isa, threads)
    with _pinned():
        return _measure(prober, isa, progress)


def filled(tables: Sequence[Table]) -> list[Table]:
    """Tables of one instruction set with what each lacks taken from the others."""

    def joined(part: str, own: Table) -> dict[str, Any]:
        parts = [getattr(table, part) for table in (*tables, own)]
        return {name: rate for rates in parts for name, rate in rates.items()}

    return [
        replace(t, linear=joined("linear", t), vector=joined("vector", t), attention=joined("attention", t))
        for t in tables
    ]


def _measure(prober: Prober, isa: str, progress: Progress | None) -> list[Table]:
    pool, workers = prober._pool, prober.threads
    states: list[_State] = []
    rates: list[Rates] = []
    total, done = len(FORMATS) + len(_KV) + 1, 0
    last = max(1, cache_bytes()[1])

    def probed(measure: Callable[[], _T]) -> tuple[_T, _State, list[Rates]]:
        """What is measured while the machine stays in one state and nobody takes the processors, or the last
        of several attempts."""
        for attempt in range(_ATTEMPTS):
            near = prober.measure(_PROBE_SECONDS)
            found = measure()
            after = prober.measure(_PROBE_SECONDS)
            rates.extend((near, after))
            quiet = _slowest([near, after]) > _QUIET * max(r.int8_gmacs for r in rates)
            if (quiet and _alike(near.read_gb_s, after.read_gb_s)) or attempt == _ATTEMPTS - 1:
                break
        return found, _state(states, (near.read_gb_s + after.read_gb_s) / 2), [near, after]

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    for stored in FORMATS:
        held = _Bench(_graph(stored, 1), "bf16", isa, pool)
        layers = max(2, math.ceil(min(_STREAM * last, _MOST_STREAM) / _layer_bytes(held.program)))
        streamed = _Bench(_graph(stored, layers), "bf16", isa, pool)
        rows_taken = ROWS if isa != "scalar" else ROWS[:-2]
        held.times(_spans(rows_taken[-1]), 3)  # the processor comes up to speed

        def both(
            held: _Bench = held, streamed: _Bench = streamed, rows_taken: Sequence[int] = rows_taken
        ) -> tuple[list[_Sample], list[_Sample]]:
            return (
                [s for rows in rows_taken for s in held.times(_spans(rows))],
                [s for rows in (1, 2, 4) for s in streamed.times(_spans(rows), 5)],
            )

        (samples, far), state, around = probed(both)
        peak = _peak(around, stored) * 1e9
        read = sum(r.read_gb_s for r in around) / 2 * 1e9
        state.linear[stored] = fit_linear(held, samples, streamed, far, peak=peak, read=read, threads=workers)
        _note_vectors(held.graph, samples, state.vector)
        tick()
    plain = _Bench(_graph("f32", 1, fused=False), "bf16", isa, pool)
    samples, state, _ = probed(lambda: [s for rows in ROWS[:-1] for s in plain.times(_spans(rows), 7)])
    _note_vectors(plain.graph, samples, state.vector, only_new=True)
    tick()
    for kv_dtype in _KV:
        rate, state, _ = probed(lambda kv_dtype=kv_dtype: _attention(kv_dtype, isa, pool, workers))
        state.attention[kv_dtype] = rate
        tick()
    peaks = {
        name: median(getattr(r, f"{name}_gmacs") for r in rates) / workers
        for name in ("int8", "bf16", "fp32")
    }
    return [
        Table(
            threads=workers,
            peaks=peaks,
            read_gb_s=median(state.reads),
            linear=state.linear,
            vector={name: fit_vector(found, workers) for name, found in state.vector.items()},
            attention=state.attention,
        )
        for state in states
    ]


def _alike(a: float, b: float) -> bool:
    return max(a, b) < _SAME * min(a, b)


def _state(states: list[_State], read: float) -> _State:
    """The state with about this read rate, or a new one."""
    for state in states:
        if _alike(median(state.reads), read):
            state.reads.append(read)
            return state
    states.append(_State(reads=[read]))
    return states[-1]


def fit_linear(
    held: _Bench,
    samples: Sequence[_Sample],
    streamed: _Bench,
    far: Iterable[_Sample],
    *,
    peak: float,
    read: float,
    threads: int,
) -> LinearRate:
    """Least squares over layers that the caches hold: an overhead, a time for each output, and at each number
    of rows a time for each multiplication. Then the part of the read rate that explains the others best."""
    lines, times = [], []
    for s in samples:
        shape = _linear_shape(held.graph, s.instruction)
        if shape is None or s.rows not in ROWS:
            continue
        inputs, multiplied, outputs, head = shape
        line = [0.0] * (len(ROWS) + 3)
        line[ROWS.index(s.rows)] = inputs * multiplied * s.rows / peak
        line[len(ROWS) + head] = outputs * s.rows * 1e-9 / threads
        line[len(ROWS) + 2] = 1e-6
        lines.append([x / s.seconds for x in line])
        times.append(1.0)
    solved = non_negative(np.asarray(lines), np.asarray(times))
    inverse: list[float] = []
    for rows, x in zip(ROWS, solved, strict=False):
        measured = any(s.rows == rows for s in samples)
        inverse.append(max(float(x), _LEAST) if measured else inverse[-1])
    output, head_ns, overhead = (float(x) for x in solved[len(ROWS) :])
    rate = LinearRate(
        bandwidth=1.0,
        compute=tuple(1.0 / x for x in inverse),
        output_ns=output,
        head_ns=head_ns,
        overhead_us=overhead,
    )
    parts = []
    sizes = streamed.program._place_bytes
    seen: dict[tuple[str, int], list[float]] = defaultdict(list)
    about: dict[tuple[str, int], tuple[int, int, int, int, int]] = {}
    for s in far:
        shape = _linear_shape(streamed.graph, s.instruction)
        if shape is None or s.instruction.op == "linear_top1":
            continue
        name = (f"{s.instruction.op} {shape}", s.rows)
        seen[name].append(s.seconds)
        about[name] = (*shape, sum(sizes[w] for w in s.instruction.weights))
    for name, taken in seen.items():
        inputs, multiplied, outputs, _, size = about[name]
        rows = name[1]
        busy = (
            inputs * multiplied * rows / (peak * rate.part(rows)) + output * 1e-9 * outputs * rows / threads
        )
        left = float(np.median(taken)) - overhead * 1e-6
        fetching = max(left**SOFTNESS - busy**SOFTNESS, (0.3 * left) ** SOFTNESS) ** (1 / SOFTNESS)
        alone = max(fetching - size / (PASSING_GB_S * 1e9 * threads), 0.3 * fetching)
        parts.append(size / alone / read)
    return replace(rate, bandwidth=min(1.5, float(np.median(parts))))


def fit_vector(found: Sequence[tuple[float, float, float]], threads: int) -> VectorRate:
    """found: (width, rows, seconds)."""
    lines = [[1e-6 / t, vector_seconds(0.0, 1.0, int(width), rows, threads) / t] for width, rows, t in found]
    overhead, number = non_negative(np.asarray(lines), np.ones(len(lines)))
    return VectorRate(overhead_us=float(overhead), number_ns=float(number))


def non_negative(a: Floats, b: Floats) -> Floats:
    """Least squares with what comes out below zero held at zero (an active set, from Lawson and Hanson, 1974,
    in the direction of leaving out alone)."""
    active = list(range(a.shape[1]))
    out = np.zeros(a.shape[1])
    while active:
        solved = np.linalg.lstsq(a[:, active], b, rcond=None)[0]
        if (solved >= 0).all():
            out[active] = solved
            return out
        active = [index for index, x in zip(active, solved, strict=True) if x >= 0]
    return out


def _attention(kv_dtype: str, isa: str, pool: _native.Pool, threads: int) -> AttentionRate:
    lines, times = [], []
    for heads, kv_heads in ((8, 2), (8, 8)):
        graph = _graph("int8", 1, heads=heads, kv_heads=kv_heads)
        bench = _Bench(graph, kv_dtype, isa, pool, table=32)
        work = AttentionWork(heads, kv_heads, _SHAPE["head_dim"], None, 0, False)
        for spans in (
            *([(before, 1)] * count for before in (31, 127, 479) for count in (1, 4, 16)),
            *([(before, new)] for before in (0, 256) for new in (2, 8, 32, 128, 256)),
        ):
            [sample] = [s for s in bench.times(spans, 7) if s.instruction.op == "attention"]
            grouped = [(count, *span) for span, count in Counter(spans).items()]
            c = attention_counts(work, grouped, threads)
            line = [1e-6, 1e-6 * c.tiles, 1e-6 * c.rows, 1e-9 * c.keys, 1e-9 * c.pairs]
            lines.append([x / sample.seconds for x in line])
            times.append(1.0)
    solved = non_negative(np.asarray(lines), np.asarray(times))
    overhead, tile, row, key, pair = (float(x) for x in solved)
    return AttentionRate(overhead_us=overhead, tile_us=tile, row_us=row, key_ns=key, pair_ns=pair)


def _note_vectors(
    graph: Graph,
    samples: Iterable[_Sample],
    into: dict[str, list[tuple[float, float, float]]],
    *,
    only_new: bool = False,
) -> None:
    known = set(into) if only_new else set()
    nodes = {node.outputs[0]: node for node in graph.nodes}
    for s in samples:
        op = s.instruction.op
        if "linear" in op or op in ("attention", "experts"):
            continue
        node = nodes[s.instruction.node]
        value = graph.values[node.outputs[0] if op == "embed" else node.inputs[0]]
        width = value.shape[1]
        assert isinstance(width, int)
        name = op
        if op in ("embed", "prepare") or graph.values[node.outputs[0]].dtype == "prepared":
            name += f" {_format(graph)}"
        if name not in known:
            into[name].append((width, s.rows, s.seconds))


def _linear_shape(graph: Graph, instruction: Instruction) -> tuple[int, int, int, int] | None:
    """Inputs, outputs of all matrices, outputs stored, and whether it looks at logits (1) or stores them."""
    if "linear" not in instruction.op:
        return None
    weights = [graph.weights[name] for name, _ in instruction.weights]
    width = graph.values[instruction.node].shape[1]
    assert isinstance(width, int)
    multiplied = sum(w.shape[0] for w in weights)
    return weights[0].shape[1], multiplied, width, int(instruction.op == "linear_top1")


def _spans(rows: int) -> list[tuple[int, int]]:
    """Steps of so many rows, all of them sampled where there is room."""
    return [(_CONTEXT, 1)] * rows if rows <= 64 else [(0, rows // 8)] * 8


def _format(graph: Graph) -> str:
    return next(w.stored for w in graph.weights.values() if len(w.shape) == 2)


def _layer_bytes(program: CpuProgram) -> int:
    return sum(size for (name, _), size in program._place_bytes.items() if name.startswith("layers."))


def _graph(
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
        mixed_precision=MixedPrecision(dtype="f16" if name == "f16" else "bf16") if name in ("f16", "bf16") else None,
    )  # fmt: skip
    if not fused:
        config = replace(config, operator_fusion=None, layer_fusion=None)
    graph = build_graph(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": _SHAPE["hidden"],
            "intermediate_size": _SHAPE["inner"],
            "num_hidden_layers": layers,
            "num_attention_heads": heads or _SHAPE["heads"],
            "num_key_value_heads": kv_heads or _SHAPE["kv_heads"],
            "head_dim": _SHAPE["head_dim"],
            "vocab_size": _SHAPE["vocab"],
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e4,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
        },
        name=f"calibration-{layers}",
    )
    if sparse:
        from gossamer.checkpoint.sparsity import with_nonzeros

        graph = with_nonzeros(graph, DummySource(graph, "0.5"), count=True)
    return run_passes(graph, config)[0]


def _slowest(rates: Sequence[Rates]) -> float:
    return min(r.int8_gmacs for r in rates)


@contextmanager
def _pinned() -> Iterator[None]:
    """This thread on the first processor, where no worker of a pool is pinned."""
    if not hasattr(os, "sched_getaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def _peak(rates: Sequence[Rates], stored: str) -> float:
    return max(float(getattr(r, f"{peak_of(stored)}_gmacs")) for r in rates)


def _single_read(isa: str) -> float:
    """Part of the read rate of all threads that one thread reaches."""
    every, one = Prober(isa), Prober(isa, 1)
    parts = [
        one.measure(_PROBE_SECONDS).read_gb_s / every.measure(_PROBE_SECONDS).read_gb_s for _ in range(3)
    ]
    return min(1.0, float(np.median(parts)))
