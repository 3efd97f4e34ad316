"""The memory figures that every verb reports alike."""

from __future__ import annotations

import psutil

from gossamer.backends.base import MemoryReport

__all__ = ["memory_figures", "resident_bytes"]


def resident_bytes() -> int:
    """What this process holds in memory now (its resident set)."""
    return int(psutil.Process().memory_info().rss)


def memory_figures(report: MemoryReport) -> dict[str, int]:
    """The plan's bytes by purpose and what the process really holds, for JSON."""
    return {
        "weights_bytes": report.weights,
        "kv_bytes": report.kv,
        "kv_tokens": report.kv_tokens,
        "arena_bytes": report.arena,
        "arena_separate_bytes": report.arena_separate,
        "arena_shared_bytes": report.arena_shared,
        "workspace_bytes": report.workspace,
        "draft_bytes": report.draft,
        "host_bytes": report.host,
        "total_bytes": report.total,
        "resident_bytes": resident_bytes(),
    }
