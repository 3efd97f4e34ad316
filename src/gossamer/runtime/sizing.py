"""How much KV memory there is to be, and so how long a sequence may grow."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from pathlib import Path

import psutil

from gossamer.backends.cpu.program import kv_page_bytes
from gossamer.config import EngineConfig
from gossamer.errors import ConfigError, MemoryBudgetError
from gossamer.graph.ir import Graph

__all__ = ["KVPlan", "available_memory", "plan_kv"]

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class KVPlan:
    """page_size in tokens; pages of each KV group; the longest sequence that may run."""

    page_size: int
    pages: int
    max_model_len: int


def available_memory() -> int:
    """Bytes this process may still take: the machine's available memory, its cgroup's rest, RLIMIT_AS."""
    limits = [int(psutil.virtual_memory().available)]
    for limit, usage in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            text = Path(limit).read_text().strip()
            if text.isdigit():
                limits.append(max(0, int(text) - int(Path(usage).read_text())))
        except (OSError, ValueError):
            continue
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        limits.append(max(0, soft - psutil.Process().memory_info().vms))
    return min(limits)


def plan_kv(graph: Graph, config: EngineConfig, budget: int) -> KVPlan:
    """Pages for max_num_seqs sequences of max_model_len, within kv_bytes (default: an eighth of budget).

    A max_model_len that was asked for must fit at least once; the model's own is cut to what does.
    Raises MemoryBudgetError with the numbers otherwise, ConfigError where the model's positions end earlier.
    """
    limit = config.kv_bytes if config.kv_bytes is not None else budget // 8
    wanted = config.max_model_len or graph.max_positions
    if wanted > graph.reach:
        raise ConfigError(
            f"max_model_len {wanted} is beyond the {graph.reach} positions that this model serves; lower it, "
            "or stretch them with rope_scaling in config.json where the model has rotary positions"
        )
    if config.paged_attention is not None:
        size = config.paged_attention.page_size
        per_page = kv_page_bytes(graph, size, config.kv_dtype)
        pages = min(limit // per_page, config.max_num_seqs * _ceil(wanted, size))
        if config.max_model_len is not None and config.kv_bytes is None:
            pages = max(pages, _ceil(wanted, size))
        length = min(wanted, pages * size)
    else:
        if config.max_model_len is None:
            wanted = min(
                wanted, limit // kv_page_bytes(graph, 16, config.kv_dtype) * 16 // config.max_num_seqs
            )
        size = max(16, _ceil(wanted, 16) * 16)
        per_page = kv_page_bytes(graph, size, config.kv_dtype)
        pages = min(max(1, limit // per_page), config.max_num_seqs)
        length = min(wanted, size)
    need = _ceil(wanted, size) * per_page
    if pages < 1 or length < 1 or (config.max_model_len is not None and length < wanted):
        raise MemoryBudgetError(
            f"one sequence of {wanted} tokens needs {need / _MIB:.1f} MiB of {config.kv_dtype} KV memory and "
            f"{limit / _MIB:.1f} MiB are given; "
            + (
                f"at most --max-model-len {pages * size} fits"
                if pages * size >= 1
                else "nothing fits: raise --kv-bytes"
            )
        )
    return KVPlan(size, pages, length)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
