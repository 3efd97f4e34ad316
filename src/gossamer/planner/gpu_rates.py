"""The GPU's limits: measured now, or as they were last measured."""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import asdict
from pathlib import Path

from gossamer.backends.cuda.rates import GpuRates
from gossamer.checkpoint.cache_directory import cache_directory

__all__ = ["measure_gpu", "remembered_gpu"]


def measure_gpu() -> GpuRates | None:
    """Measures the first GPU, and remembers; None where there is none, or no torch to measure with. Raises
    ConfigError for a GPU that is too old, DependencyError where Triton is missing."""
    if importlib.util.find_spec("torch") is None:
        return None
    from gossamer.backends.cuda.probe import gpu_here, probe_gpu

    device = gpu_here()
    if device is None:
        return None
    rates = probe_gpu(device)
    path = _path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f"{path.name}.{os.getpid()}")
        aside.write_text(json.dumps({**_read(), "": asdict(rates), rates.name: asdict(rates)}))
        aside.replace(path)
    except OSError:
        pass  # what cannot be remembered is measured again
    return rates


def remembered_gpu(name: str | None = None) -> GpuRates | None:
    """Those of a GPU of that name, or of the last one that was measured here; None: none was."""
    try:
        return GpuRates(**_read()[name or ""])  # type: ignore[arg-type]
    except (KeyError, TypeError):
        return None


def _path() -> Path:
    return cache_directory() / "gpu-rates.json"


def _read() -> dict[str, dict[str, object]]:
    try:
        known = json.loads(_path().read_bytes())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
