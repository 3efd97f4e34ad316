"""What this machine is, and what it can do at most: the limits that every figure is held against."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil

from gossamer import _native
from gossamer.errors import ConfigError
from gossamer.memory import available_memory, cgroup_limit
from gossamer.processor import processor_name

__all__ = [
    "Cache",
    "Hardware",
    "Prober",
    "Rates",
    "cache_bytes",
    "hardware",
    "median_rates",
    "probe_buffer_bytes",
]

_SECONDS = 0.15  # for each of the four figures


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """One cache of the first processor this process may use; shared_by counts hardware threads."""

    level: int
    kind: str
    bytes: int
    shared_by: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """cores: processors this process may run on (its affinity); isas: instruction sets with kernels that
    run here, slowest first. Memory in bytes; memory_limit: that of the tightest control group around this
    process, None where there is none."""

    cpu: str
    cores: int
    isas: tuple[str, ...]
    best_isa: str
    caches: tuple[Cache, ...]
    memory_total: int
    memory_available: int
    memory_limit: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Measured limits: streaming read from DRAM, and multiply-accumulates per second (1e9) of
    register-only loops, on `threads` threads with the instructions of `isa`."""

    read_gb_s: float
    int8_gmacs: float
    bf16_gmacs: float
    fp32_gmacs: float
    threads: int
    isa: str


def hardware() -> Hardware:
    """What the system says about itself; nothing is measured."""
    processors = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    memory = psutil.virtual_memory()
    return Hardware(
        cpu=processor_name(),
        cores=len(processors) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        isas=tuple(_native.isas()),
        best_isa=str(_native.best_isa()),
        caches=tuple(_caches(processors[0])),
        memory_total=int(memory.total),
        memory_available=int(memory.available),
        memory_limit=cgroup_limit(),
    )


class Prober:
    """Measures the limits again and again on one pool of threads.

    isa: None is the best there is; threads: None is one per processor. Raises ConfigError for an
    instruction set that this machine lacks.
    """

    def __init__(self, isa: str | None = None, threads: int | None = None) -> None:
        there = _native.isas()
        if isa is not None and isa not in there:
            raise ConfigError(f"this machine cannot run {isa} kernels; it can run {', '.join(there)}")
        self.isa = isa or str(_native.best_isa())
        self._pool = _native.Pool(threads or 0)
        self.threads = int(self._pool.size)

    def measure(self, seconds: float | None = None) -> Rates:
        """All four limits, about `seconds` (default 0.15) each. The buffer that is read is gone on return."""
        buffer = probe_buffer_bytes()
        figures = _native.probe(self._pool, self.isa, seconds or _SECONDS, buffer)
        read, int8, bf16, fp32 = (round(float(x), 3) for x in figures)
        return Rates(
            read_gb_s=read,
            int8_gmacs=int8,
            bf16_gmacs=bf16,
            fp32_gmacs=fp32,
            threads=self.threads,
            isa=self.isa,
        )


def probe_buffer_bytes() -> int:
    """Bytes that a probe reads: twice the last cache, 0.5 to 1 GiB, at most a quarter of what is left."""
    largest = max((cache.bytes for cache in _caches(0)), default=0)
    wanted = min(max(512 << 20, 2 * largest), 1 << 30)
    return min(wanted, max(available_memory() // 4, 64 << 20))


def cache_bytes() -> tuple[int, int]:
    """Bytes of the largest cache that one core has for itself, over all processors this process may use;
    and of the last level, whoever shares it."""
    here = hardware()
    own = max((c.bytes // c.shared_by for c in here.caches if c.level <= 2), default=0) * here.cores
    return own, max((c.bytes for c in here.caches), default=0)


def median_rates(rates: Sequence[Rates]) -> Rates:
    """Median of each figure over several measurements of one prober."""
    return Rates(
        read_gb_s=median(r.read_gb_s for r in rates),
        int8_gmacs=median(r.int8_gmacs for r in rates),
        bf16_gmacs=median(r.bf16_gmacs for r in rates),
        fp32_gmacs=median(r.fp32_gmacs for r in rates),
        threads=rates[0].threads,
        isa=rates[0].isa,
    )


def _caches(processor: int) -> list[Cache]:
    found = []
    for entry in sorted(Path(f"/sys/devices/system/cpu/cpu{processor}/cache").glob("index*")):
        try:
            size = (entry / "size").read_text().strip()
            units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
            number = int(size[:-1]) * units[size[-1]] if size[-1] in units else int(size)
            found.append(
                Cache(
                    level=int((entry / "level").read_text()),
                    kind=(entry / "type").read_text().strip().lower(),
                    bytes=number,
                    shared_by=_listed((entry / "shared_cpu_list").read_text().strip()),
                )
            )
        except (OSError, ValueError, IndexError):  # a virtual machine may hide any of them
            continue
    return found


def _listed(ranges: str) -> int:
    """How many processors a list such as 0-3,8 names."""
    count = 0
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        count += int(last or first) - int(first) + 1
    return count
