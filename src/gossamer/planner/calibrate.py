"""Measures the efficiencies of this machine: small programs of random weights against the probe beside them.

Two programs for each weight format, one whose weights the caches hold and one whose they do not, run steps of
ever more rows, whose instructions are timed apart (the receipts); of each the median counts. The rates are
then least squares over all layer shapes and numbers of rows, by relative error.
"""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from typing import Any, TypeVar

import numpy as np

from gossamer import _native
from gossamer.planner.efficiencies import (
    ROWS,
    SHIPPED,
    AttentionRate,
    Efficiencies,
    LinearRate,
    Table,
    peak_of,
)
from gossamer.planner.fitting import fit_linear, fit_vector, non_negative, note_vectors
from gossamer.planner.hardware import Prober, Rates, cache_bytes
from gossamer.planner.roofline import attention_counts
from gossamer.planner.small_programs import SHAPE, Sample, SmallProgram, layer_bytes, small_graph
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
_PROBE_SECONDS = 0.06
_ATTEMPTS = 3  # at a format, while others take the processors
_SAME = 1.25  # read rates that differ by less are of one state
_QUIET = 0.93  # of the fastest probe: with less, others took part of them

_T = TypeVar("_T")
Progress = Callable[[int, int], None]


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
    """Tables of one instruction set with what each lacks taken from the others. What a layer multiplies and
    reads is theirs then; what passes between threads is the own state's, the median of its formats."""

    def joined(part: str, own: Table) -> dict[str, Any]:
        parts = [getattr(table, part) for table in (*tables, own)]
        return {name: rate for rates in parts for name, rate in rates.items()}

    def linear(own: Table) -> dict[str, LinearRate]:
        typical = {
            name: median(getattr(rate, name) for rate in own.linear.values())
            for name in ("output_ns", "head_ns", "overhead_us")
            if own.linear
        }
        every = joined("linear", own).items()
        return {name: rate if name in own.linear else replace(rate, **typical) for name, rate in every}

    return [
        replace(t, linear=linear(t), vector=joined("vector", t), attention=joined("attention", t))
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
        held = SmallProgram(small_graph(stored, 1), "bf16", isa, pool)
        layers = max(2, math.ceil(min(_STREAM * last, _MOST_STREAM) / layer_bytes(held.program)))
        streamed = SmallProgram(small_graph(stored, layers), "bf16", isa, pool)
        rows_taken = ROWS if isa != "scalar" else ROWS[:-2]
        held.times(_spans(rows_taken[-1]), 3)  # the processor comes up to speed

        def both(
            held: SmallProgram = held,
            streamed: SmallProgram = streamed,
            rows_taken: Sequence[int] = rows_taken,
        ) -> tuple[list[Sample], list[Sample]]:
            return (
                [s for rows in rows_taken for s in held.times(_spans(rows))],
                [s for rows in (1, 2, 4) for s in streamed.times(_spans(rows), 5)],
            )

        (samples, far), state, around = probed(both)
        peak = _peak(around, stored) * 1e9
        read = sum(r.read_gb_s for r in around) / 2 * 1e9
        state.linear[stored] = fit_linear(held, samples, streamed, far, peak=peak, read=read, threads=workers)
        note_vectors(held.graph, samples, state.vector)
        tick()
    plain = SmallProgram(small_graph("f32", 1, fused=False), "bf16", isa, pool)
    samples, state, _ = probed(lambda: [s for rows in ROWS[:-1] for s in plain.times(_spans(rows), 7)])
    note_vectors(plain.graph, samples, state.vector, only_new=True)
    tick()
    for kv_dtype in _KV:
        rate, state, _ = probed(partial(_attention, kv_dtype, isa, pool, workers))
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


def _attention(kv_dtype: str, isa: str, pool: _native.Pool, threads: int) -> AttentionRate:
    lines, times = [], []
    for heads, kv_heads in ((8, 2), (8, 8)):
        graph = small_graph("int8", 1, heads=heads, kv_heads=kv_heads)
        bench = SmallProgram(graph, kv_dtype, isa, pool, table=32)
        work = AttentionWork(heads, kv_heads, SHAPE["head_dim"], None, 0, False)
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


def _spans(rows: int) -> list[tuple[int, int]]:
    """Steps of so many rows, all of them sampled where there is room."""
    return [(_CONTEXT, 1)] * rows if rows <= 64 else [(0, rows // 8)] * 8


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
