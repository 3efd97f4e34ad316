"""The machine's limits as they were last measured, so that not every start has to measure them again."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from gossamer.checkpoint.cache_directory import cache_directory
from gossamer.planner.hardware import Prober, Rates
from gossamer.processor import processor_signature

__all__ = ["measure", "rates_at_hand"]

_RATES = TypeAdapter(dict[str, Rates])
_SECONDS = 0.1  # for each figure


def measure(isa: str | None = None, threads: int | None = None, seconds: float | None = None) -> Rates:
    """Measures now, and remembers."""
    rates = Prober(isa, threads).measure(seconds)
    known = _read() | {_key(isa, threads): rates}
    path = _path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f"{path.name}.{os.getpid()}")
        aside.write_text(json.dumps({key: asdict(value) for key, value in known.items()}))
        aside.replace(path)
    except OSError:
        pass  # a cache that cannot be written costs the next start a second, and nothing else
    return rates


def rates_at_hand(isa: str | None = None, threads: int | None = None) -> Rates:
    """Remembered ones, else measured now, in less time than `measure` takes by itself."""
    found = _read().get(_key(isa, threads))
    return measure(isa, threads, _SECONDS) if found is None else found


def _path() -> Path:
    return cache_directory() / "rates.json"


def _key(isa: str | None, threads: int | None) -> str:
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{processor_signature()}/{isa or 'best'}/{threads or 'all'}/{processors}"


def _read() -> dict[str, Rates]:
    try:
        return _RATES.validate_json(_path().read_bytes())
    except (OSError, ValidationError):
        return {}
