"""Which part of the machine's limits kernels reach: measured here, fitted from what ran here, or as shipped.

A table belongs to an instruction set. Whatever a processor computes is kept as a part of the probed peak, so
that a machine that is slower today (others use it, its clock is lower) is expected to be slower in all of it;
what comes from memory, as a part of the probed read rate.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from gossamer.checkpoint.cache_directory import cache_directory
from gossamer.planner.hardware import Rates
from gossamer.processor import processor_signature

__all__ = [
    "ROWS",
    "SHIPPED",
    "AttentionRate",
    "Efficiencies",
    "LinearRate",
    "PythonCosts",
    "Table",
    "VectorRate",
    "current_efficiencies",
    "efficiencies_from_json",
    "forget_efficiencies",
    "measured_file",
    "peak_of",
    "save_efficiencies",
    "save_fitted",
    "scaled_peaks",
]

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Rows at which linear layers are measured; between them times are interpolated, beyond the last they grow
in proportion."""
_VERSION = 1  # raise when kernels or the model of time change so much that measurements are worth little


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearRate:
    """Linear layers of one weight format. bandwidth: part of the probed read rate where weights come from
    memory; compute: part of the format's probed peak at each of ROWS, weights in cache; output_ns, head_ns:
    of a thread for each output stored, and for each logit looked at; overhead_us: of a call."""

    bandwidth: float
    compute: tuple[float, ...]
    output_ns: float
    head_ns: float
    overhead_us: float

    def part(self, rows: float) -> float:
        """Part of the peak at so many rows: the time of a multiplication is linear in log(rows) between
        two that were measured."""
        if rows <= ROWS[0]:
            return self.compute[0]
        if rows >= ROWS[-1]:
            return self.compute[-1]
        at = next(i for i, r in enumerate(ROWS) if r >= rows)
        share = math.log(rows / ROWS[at - 1]) / math.log(ROWS[at] / ROWS[at - 1])
        return 1.0 / ((1 - share) / self.compute[at - 1] + share / self.compute[at])


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorRate:
    """An op over rows of numbers. overhead_us: of a call; number_ns: of a thread for each number."""

    overhead_us: float
    number_ns: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionRate:
    """Attention over one KV type, by tile (a KV head over up to 32 queries of a sequence). overhead_us: of a
    call; of a thread: tile_us for each tile, row_us for each row of it (query times head), key_ns for each
    number of a key or value read, pair_ns for each that a row multiplies."""

    overhead_us: float
    tile_us: float
    row_us: float
    key_ns: float
    pair_ns: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Of one instruction set. threads, peaks, read_gb_s: how many there were when it was measured, the GMAC/s
    of one of them for "int8", "bf16" and "fp32", and what all read from memory; linear by weight format
    ("int4-g64"), vector by op (and format, where it prepares for one), attention by KV type."""

    threads: int
    peaks: Mapping[str, float]
    read_gb_s: float
    linear: Mapping[str, LinearRate]
    vector: Mapping[str, VectorRate]
    attention: Mapping[str, AttentionRate]

    def linear_of(self, stored: str) -> LinearRate:
        """Of a format, or its nearest: same kind of number, nearest group."""
        if stored in self.linear:
            return self.linear[stored]
        return self.linear[min(self.linear, key=lambda name: _distance(name, stored))]

    def vector_of(self, op: str) -> VectorRate:
        """Of an op, of another format of it, or the median of all."""
        if op in self.vector:
            return self.vector[op]
        first = op.partition(" ")[0]
        near = [rate for name, rate in self.vector.items() if name.partition(" ")[0] == first]
        rates = near or list(self.vector.values())
        return sorted(rates, key=lambda rate: rate.number_ns)[len(rates) // 2]


@dataclass(frozen=True, slots=True, kw_only=True)
class PythonCosts:
    """Microseconds outside of the program: of a step, of each sequence in it, of each prompt token, of each
    request that begins. cold_us: more for a step whose weights and keys drive all else out of the caches."""

    step_us: float
    cold_us: float
    sequence_us: float
    token_us: float
    request_us: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiencies:
    """tables by instruction set: several where the machine was met in several states. Virtual processors come
    to share a last cache and cease to, as the host moves them, and what passes between threads takes several
    times as long in one state as in the other; the read rate tells which it is. single_read: part of the read
    rate of all threads that one reaches alone. corrections: factors on predicted times that the history of
    this machine taught, by "prefill" or "decode" and format. origin: whence it all is: "shipped", "measured here", and what was fitted."""

    tables: Mapping[str, tuple[Table, ...]]
    python: PythonCosts
    single_read: float
    corrections: Mapping[str, float] = field(default_factory=dict)
    origin: str = "shipped"

    def table(self, isa: str, threads: int, rates: Rates) -> Table:
        """Of an instruction set (or the nearest that was measured), one thread or several, and the state in
        which a probe found the machine."""
        tables = self.tables.get(isa) or self.tables[max(self.tables)]
        alike = [t for t in tables if (t.threads == 1) == (threads == 1)] or list(tables)
        return min(alike, key=lambda t: abs(math.log(t.read_gb_s / rates.read_gb_s)))

    def last_caches(self, isa: str, table: Table) -> float:
        """How many last caches the threads of a table have between them, as far as its read rate tells: that
        of the slowest state of as many threads is from one."""
        tables = self.tables.get(isa, ())
        slowest = min((t.read_gb_s for t in tables if t.threads == table.threads), default=table.read_gb_s)
        return table.read_gb_s / slowest

    def correction(self, phase: str, stored: str) -> float:
        """Factor on the time of a phase with weights mostly in a format."""
        return self.corrections.get(f"{phase} {stored}", 1.0)


def peak_of(stored: str) -> str:
    """Which of the probed peaks multiplications of a weight format are held against."""
    kind = stored.partition("-")[0]
    return {"f32": "fp32", "f16": "fp32", "bf16": "bf16"}.get(kind, "int8")


def current_efficiencies() -> Efficiencies:
    """Those to predict with on this machine: as measured here where that was done, as shipped elsewhere, with
    the corrections that the history fitted. A file that is damaged or of another version counts as absent."""
    base = _read(measured_file()) or SHIPPED
    fitted = _read_json(_fitted_file())
    try:
        if fitted["base"] != base.origin or not fitted["corrections"]:
            return base
        found = {str(k): float(v) for k, v in fitted["corrections"].items() if 0.25 < float(v) < 4}
        origin = f"{base.origin}, fitted from {int(fitted['runs'])} runs"
    except (KeyError, TypeError, ValueError, AttributeError):
        return base
    return replace(base, corrections=found, origin=origin)


def save_fitted(corrections: Mapping[str, float], runs: int, base: str) -> None:
    """Keeps corrections for `current_efficiencies`. base: origin of the efficiencies they belong to."""
    _write(_fitted_file(), {"base": base, "runs": runs, "corrections": dict(corrections)})


def forget_efficiencies() -> None:
    """Back to those shipped: what was measured and fitted on this machine is removed."""
    for path in (measured_file(), _fitted_file()):
        path.unlink(missing_ok=True)


def save_efficiencies(found: Efficiencies, path: Path) -> None:
    """Writes them as JSON. A file is whole or it is not there."""
    _write(path, _plain(found))


def efficiencies_from_json(data: Mapping[str, Any]) -> Efficiencies:
    """The opposite of what `save_efficiencies` writes. Raises KeyError, TypeError or ValueError."""
    if data["version"] != _VERSION:
        raise ValueError(f"version {data['version']} of efficiencies, not {_VERSION}")
    tables = {
        str(isa): tuple(table_from_json(table) for table in found) for isa, found in data["tables"].items()
    }
    return Efficiencies(
        tables=tables,
        python=PythonCosts(**data["python"]),
        single_read=float(data["single_read"]),
        origin=str(data["origin"]),
    )


def table_from_json(data: Mapping[str, Any]) -> Table:
    """One table, of what `save_efficiencies` writes. Raises KeyError, TypeError or ValueError."""
    linear = data["linear"].items()
    return Table(
        threads=int(data["threads"]),
        peaks={str(k): float(v) for k, v in data["peaks"].items()},
        read_gb_s=float(data["read_gb_s"]),
        linear={k: LinearRate(**(v | {"compute": tuple(v["compute"])})) for k, v in linear},
        vector={k: VectorRate(**v) for k, v in data["vector"].items()},
        attention={k: AttentionRate(**v) for k, v in data["attention"].items()},
    )


def measured_file() -> Path:
    """Where what `calibrate` measured on this machine is kept."""
    return _folder() / f"efficiencies-{_VERSION}.json"


def _fitted_file() -> Path:
    return _folder() / f"fitted-{_VERSION}.json"


def _folder() -> Path:
    import hashlib

    machine = hashlib.sha256(processor_signature().encode()).hexdigest()[:16]
    return cache_directory() / "planner" / machine


def scaled_peaks(rates: Rates, isa: str, threads: int, found: Efficiencies) -> dict[str, float]:
    """GMAC/s of `threads` threads of an instruction set, from a probe that may have had others."""
    probed = {"int8": rates.int8_gmacs, "bf16": rates.bf16_gmacs, "fp32": rates.fp32_gmacs}
    share = threads / rates.threads
    if isa != rates.isa and isa in found.tables and rates.isa in found.tables:
        here, there = found.tables[isa][0].peaks, found.tables[rates.isa][0].peaks
        return {name: gmacs * share * here[name] / there[name] for name, gmacs in probed.items()}
    return {name: gmacs * share for name, gmacs in probed.items()}


def _distance(name: str, stored: str) -> tuple[bool, bool, bool, int]:
    """How unlike two formats are: sparse or not, whether the numbers are alike, groups or none, group sizes."""
    (kind, group, sparse), (other, wanted, wanted_sparse) = map(_split, (name, stored))
    alike = kind == other or {kind, other} == {"int4", "uint4"}
    return sparse != wanted_sparse, not alike, (group > 0) != (wanted > 0), abs(group - wanted)


def _split(stored: str) -> tuple[str, int, bool]:
    kind, *rest = stored.split("-")
    return kind, next((int(part[1:]) for part in rest if part[1:].isdigit()), 0), "sparse" in rest


def _plain(found: Efficiencies) -> dict[str, Any]:
    return {
        "version": _VERSION,
        "origin": found.origin,
        "single_read": round(found.single_read, 3),
        "python": _rounded(asdict(found.python)),
        "tables": {isa: [_plain_table(table) for table in tables] for isa, tables in found.tables.items()},
    }


def _plain_table(table: Table) -> dict[str, Any]:
    return {
        "threads": table.threads,
        "peaks": _rounded(table.peaks),
        "read_gb_s": _digits(table.read_gb_s),
        **{
            part: {name: _rounded(asdict(rate)) for name, rate in getattr(table, part).items()}
            for part in ("linear", "vector", "attention")
        },
    }


def _rounded(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: [_digits(x) for x in value] if isinstance(value, Sequence) else _digits(value)
        for name, value in values.items()
    }


def _digits(x: float) -> float:
    return float(f"{x:.4g}")


def _read(path: Path) -> Efficiencies | None:
    try:
        return efficiencies_from_json(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, data: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(data, indent=1))
    partial.replace(path)


@cache
def _shipped() -> Efficiencies:
    return efficiencies_from_json(json.loads((Path(__file__).parent / "efficiencies.json").read_text()))


SHIPPED = _shipped()
