"""What was predicted and what came: one row for each measured run of this machine, in SQLite.

Several processes may write at once (WAL). A file that is damaged is set aside under another name and begun
anew, and that is logged: a history that is lost costs corrections, never a run.
"""

from __future__ import annotations

import json
import logging
import math
import sqlite3
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from gossamer.checkpoint.cache_directory import cache_directory
from gossamer.planner.efficiencies import Efficiencies, current_efficiencies, save_fitted
from gossamer.planner.hardware import Rates
from gossamer.processor import processor_signature

__all__ = [
    "METRICS",
    "ErrorSummary",
    "Run",
    "error_history",
    "history_file",
    "newest_rates",
    "plain_config",
    "record",
    "refit",
    "runs",
]

_LOGGER = logging.getLogger("gossamer")

METRICS = ("total_bytes", "ttft_ms", "itl_ms", "prefill_tokens_per_s", "decode_tokens_per_s", "tokens_per_s")
"""What is predicted and measured. Of a run any of them may be absent."""
_TIMES = {"prefill": "ttft_ms", "decode": "itl_ms"}
_FEW = 3  # runs that count as much as the assumption that nothing is wrong
_STEP = 1.25  # most that one refit changes a correction by
_MOST = 2.5  # most that corrections ever become
_SHARE = 0.8  # of the processors: with less, others were served meanwhile
_SPREAD = 0.2  # of the probe before and after: with more, the machine's speed moved
_NEWEST = 200  # runs that a refit looks at
_WAIT = 10.0  # seconds for other writers

_SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (
    id INTEGER PRIMARY KEY,
    at REAL NOT NULL, machine TEXT NOT NULL, kind TEXT NOT NULL, model TEXT NOT NULL, stored TEXT NOT NULL,
    versions TEXT NOT NULL, config TEXT NOT NULL, workload TEXT NOT NULL, rates TEXT NOT NULL,
    origin TEXT NOT NULL, corrections TEXT NOT NULL,
    predicted TEXT NOT NULL, actual TEXT NOT NULL, cpu_share REAL, probe_spread REAL
)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One measured run. kind: "latency", "throughput", "ablation" or "serving"; stored: the format that most
    weights are in; config, workload: plain data as one would type them; rates: the probe's; origin,
    corrections: of the efficiencies that predicted; predicted, actual: by METRICS; cpu_share: part of its
    processors' time that the run had; probe_spread: largest difference between the probes around it, as a
    part of their median; None: not known, and then nothing is learned from it. at: seconds since 1970."""

    kind: str
    model: str
    stored: str
    config: Mapping[str, Any]
    workload: Mapping[str, Any]
    rates: Mapping[str, Any]
    predicted: Mapping[str, float]
    actual: Mapping[str, float]
    origin: str = ""
    corrections: Mapping[str, float] = field(default_factory=dict)
    cpu_share: float | None = None
    probe_spread: float | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    at: float = 0.0

    @property
    def errors(self) -> dict[str, float]:
        """Metric -> predicted / actual - 1, of those that both sides have."""
        return {
            name: self.predicted[name] / self.actual[name] - 1.0
            for name in METRICS
            if self.predicted.get(name) and self.actual.get(name)
        }

    @property
    def quiet(self) -> bool:
        """Whether efficiencies may be learned from it."""
        return (
            self.cpu_share is not None
            and self.probe_spread is not None
            and self.cpu_share >= _SHARE
            and self.probe_spread <= _SPREAD
        )


@dataclass(frozen=True, slots=True)
class ErrorSummary:
    """Of one metric and one format ("all" of them together): how many runs, and of |predicted / actual - 1|
    the median, the 90th percentile and the largest; bias: the median with its sign."""

    metric: str
    stored: str
    runs: int
    median: float
    p90: float
    worst: float
    bias: float


def history_file() -> Path:
    """Where the history is kept."""
    return cache_directory() / "history.sqlite"


def record(run: Run, path: Path | None = None) -> bool:
    """Adds a run. A history that cannot be written is logged and costs nothing else: then False."""
    try:
        with _opened(path or history_file()) as base, base:
            base.execute(
                "INSERT INTO runs (at, machine, kind, model, stored, versions, config, workload, rates, "
                "origin, corrections, predicted, actual, cpu_share, probe_spread) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    run.at or time.time(),
                    processor_signature(),
                    run.kind,
                    run.model,
                    run.stored,
                    *map(_dumped, (run.versions or _versions(), run.config, run.workload, run.rates)),
                    run.origin,
                    *map(_dumped, (run.corrections, run.predicted, run.actual)),
                    run.cpu_share,
                    run.probe_spread,
                ),
            )
    except (OSError, sqlite3.Error) as error:
        _LOGGER.warning(
            "the history %s cannot be written (%s): nothing is learned", path or history_file(), error
        )
        return False
    return True


def runs(path: Path | None = None) -> list[Run]:
    """The runs of this machine, the oldest first; empty where there is no history."""
    file = path or history_file()
    if not file.exists():
        return []
    try:
        with _opened(file) as base:
            found = base.execute(
                "SELECT kind, model, stored, config, workload, rates, predicted, actual, origin, "
                "corrections, cpu_share, probe_spread, versions, at FROM runs WHERE machine = ? ORDER BY id",
                (processor_signature(),),
            ).fetchall()
    except (OSError, sqlite3.Error) as error:
        _LOGGER.warning("the history %s cannot be read (%s)", file, error)
        return []
    return [_run(line) for line in found]


def error_history(found: Sequence[Run]) -> list[ErrorSummary]:
    """Of every metric: all runs, then those of each format."""
    errors: dict[tuple[str, str], list[float]] = defaultdict(list)
    for run in found:
        for metric, error in run.errors.items():
            for stored in ("all", run.stored):
                errors[metric, stored].append(error)
    order = sorted(errors, key=lambda key: (METRICS.index(key[0]), key[1] != "all", key[1]))
    return [_summary(*key, errors[key]) for key in order]


def newest_rates(isa: str, threads: int, path: Path | None = None) -> Rates | None:
    """What the newest probe of this machine found with so many threads of an instruction set; None: there was
    none."""
    for run in reversed(runs(path)):
        try:
            rates = Rates(**run.rates)
        except TypeError:
            continue
        if (rates.isa, rates.threads) == (isa, threads):
            return rates
    return None


def refit(path: Path | None = None) -> dict[str, float]:
    """Fits the corrections from the quiet runs and keeps them for the next predictions; gives them.

    Of each phase and format the median of log(actual / predicted) over its newest runs, predictions taken
    without the corrections of their time; few runs count little, and one refit moves a correction by a
    quarter at most.
    """
    base = current_efficiencies()
    now = base.corrections
    logs: dict[str, list[float]] = defaultdict(list)
    used = 0
    for run in [r for r in runs(path) if r.quiet and r.kind == "latency" and _same_base(r, base)][-_NEWEST:]:
        counted = False
        for phase, metric in _TIMES.items():
            if run.predicted.get(metric) and run.actual.get(metric):
                key = f"{phase} {run.stored}"
                uncorrected = run.predicted[metric] / run.corrections.get(key, 1.0)
                logs[key].append(math.log(run.actual[metric] / uncorrected))
                counted = True
        used += counted
    corrections = {}
    for key, taken in logs.items():
        wanted = math.exp(median(taken) * len(taken) / (len(taken) + _FEW))
        held = now.get(key, 1.0)
        corrections[key] = min(_MOST, max(1 / _MOST, min(held * _STEP, max(held / _STEP, wanted))))
    save_fitted(corrections, used, base.origin.partition(",")[0])
    return corrections


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _summary(metric: str, stored: str, errors: Sequence[float]) -> ErrorSummary:
    sizes = [abs(e) for e in errors]
    return ErrorSummary(
        metric, stored, len(errors), median(sizes), percentile(sizes, 0.9), max(sizes), median(errors)
    )


def _same_base(run: Run, base: Efficiencies) -> bool:
    """Corrections belong to the efficiencies that they correct."""
    return run.origin.partition(",")[0] == base.origin.partition(",")[0]


def _run(line: Sequence[Any]) -> Run:
    kind, model, stored, config, workload, rates, predicted, actual, origin, corrections, *rest = line
    share, spread, versions, at = rest
    return Run(
        kind=kind,
        model=model,
        stored=stored,
        config=_loaded(config),
        workload=_loaded(workload),
        rates=_loaded(rates),
        predicted=_loaded(predicted),
        actual=_loaded(actual),
        origin=origin,
        corrections=_loaded(corrections),
        cpu_share=share,
        probe_spread=spread,
        versions=_loaded(versions),
        at=at,
    )


def _dumped(data: Mapping[str, Any]) -> str:
    return json.dumps(dict(data), default=str)


def _loaded(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


@contextmanager
def _opened(file: Path) -> Iterator[sqlite3.Connection]:
    """A connection to a sound file; a damaged one is set aside first."""
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        base = _connected(file)
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError):  # busy, full, not ours: the file is not to blame
            raise
        aside = file.with_name(f"{file.name}.damaged-{int(time.time())}")
        file.replace(aside)
        for end in ("-wal", "-shm"):
            file.with_name(file.name + end).unlink(missing_ok=True)
        _LOGGER.warning(
            "the history %s is damaged (%s): set aside as %s, begun anew", file, error, aside.name
        )
        base = _connected(file)
    with closing(base):
        yield base


def _connected(file: Path) -> sqlite3.Connection:
    base = sqlite3.connect(file, timeout=_WAIT)
    try:
        base.execute("PRAGMA journal_mode=WAL")
        base.execute(_SCHEMA)
        [answer] = base.execute("PRAGMA quick_check(1)").fetchone()
        if answer != "ok":
            raise sqlite3.DatabaseError(answer)
    except BaseException:
        base.close()
        raise
    return base


def _versions() -> dict[str, str]:
    import platform

    from gossamer import __version__

    return {"gossamer": __version__, "python": platform.python_version()}


def plain_config(config: Any) -> dict[str, Any]:
    """A configuration as plain data: what is not None."""
    return {name: value for name, value in asdict(config).items() if value is not None}
