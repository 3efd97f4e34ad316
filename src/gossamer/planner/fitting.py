"""From the times of instructions to rates: least squares by relative error, nothing below zero."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from gossamer.backends.cpu.lower import Instruction
from gossamer.graph.ir import Graph
from gossamer.planner.efficiencies import ROWS, LinearRate, VectorRate
from gossamer.planner.roofline import PASSING_GB_S, SOFTNESS, vector_seconds
from gossamer.planner.small_programs import Sample, SmallProgram, stored_format

__all__ = ["fit_linear", "fit_vector", "non_negative", "note_vectors"]

_LEAST = 0.8  # 1 / the part of a peak that nothing surpasses
_BUSY = 0.8  # part of a layer's time

Floats = npt.NDArray[np.float64]


def fit_linear(
    held: SmallProgram,
    samples: Sequence[Sample],
    streamed: SmallProgram,
    far: Iterable[Sample],
    *,
    peak: float,
    read: float,
    threads: int,
) -> LinearRate:
    """Least squares over layers that the caches hold: an overhead, a time for each output, and at each number
    of rows a time for each multiplication. Then the part of the read rate that explains the others best."""
    lines, times = [], []
    for s in samples:
        shape = linear_shape(held.graph, s.instruction)
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
        shape = linear_shape(streamed.graph, s.instruction)
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
        if busy > _BUSY * left:  # multiplying hides what memory takes
            continue
        fetching = (left**SOFTNESS - busy**SOFTNESS) ** (1 / SOFTNESS)
        alone = max(fetching - size / (PASSING_GB_S * 1e9 * threads), 0.3 * fetching)
        parts.append(size / alone / read)
    return replace(rate, bandwidth=min(1.5, float(np.median(parts))) if parts else 1.0)


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


def note_vectors(
    graph: Graph,
    samples: Iterable[Sample],
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
            name += f" {stored_format(graph)}"
        if name not in known:
            into[name].append((width, s.rows, s.seconds))


def linear_shape(graph: Graph, instruction: Instruction) -> tuple[int, int, int, int] | None:
    """Inputs, outputs of all matrices, outputs stored, and whether it looks at logits (1) or stores them."""
    if "linear" not in instruction.op:
        return None
    weights = [graph.weights[name] for name, _ in instruction.weights]
    width = graph.values[instruction.node].shape[1]
    assert isinstance(width, int)
    multiplied = sum(w.shape[0] for w in weights)
    return weights[0].shape[1], multiplied, width, int(instruction.op == "linear_top1")
