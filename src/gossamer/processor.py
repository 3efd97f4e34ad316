"""What processor this is, as the system names it."""

from __future__ import annotations

from pathlib import Path

__all__ = ["processor_name", "processor_signature"]

_CPUINFO = Path("/proc/cpuinfo")


def processor_name() -> str:
    """The model's name; "unknown" where the system does not say."""
    return _fields().get("model name", "unknown")


def processor_signature() -> str:
    """Name, family, model and stepping: what has one signature has one set of timings."""
    fields = _fields()
    parts = (fields.get(name, "") for name in ("model name", "cpu family", "model", "stepping"))
    return " ".join(filter(None, parts)) or "unknown"


def _fields() -> dict[str, str]:
    """Of the first processor."""
    try:
        first = _CPUINFO.read_text().split("\n\n", 1)[0]
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (l.partition(":") for l in first.splitlines())}
