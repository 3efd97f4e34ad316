"""How much memory this process may have: the machine's, its control groups', its address space's."""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Iterator
from pathlib import Path

import psutil

__all__ = ["anonymous_bytes", "available_memory", "cgroup_limit", "give_back"]

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_STATUS = Path("/proc/self/status")
_M_TRIM_THRESHOLD = -1  # malloc.h
_KEPT = 1 << 20  # bytes at the end of an arena that may stay
_UNLIMITED = 1 << 60  # version 1 writes "no limit" as a huge number


def available_memory() -> int:
    """Bytes this process may still take: what the machine has available, what is left of every control
    group it is in, and what is left of RLIMIT_AS; the least of them."""
    rests = [int(psutil.virtual_memory().available)]
    rests += [max(0, limit - _used(group)) for group, limit in _limited_groups()]
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        rests.append(max(0, soft - psutil.Process().memory_info().vms))
    return min(rests)


def anonymous_bytes() -> int:
    """Bytes this process holds that belong to no file (anonymous and shared memory): those that the kernel
    cannot take back. Where it does not tell them apart, all that is unique to the process."""
    try:
        lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
        return sum(int(lines[name].split()[0]) for name in ("RssAnon", "RssShmem")) << 10
    except (OSError, KeyError):
        return int(psutil.Process().memory_full_info().uss)


def give_back() -> None:
    """Returns to the kernel what the C library keeps of freed memory, where it is glibc, which keeps much.

    Its malloc_trim spares the end of every arena but the main one. That shrinks when a block before it is
    freed and it is longer than a threshold, which follows the largest block that was ever freed: hence it is
    fixed, and a block is freed.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        return
    libc.mallopt(_M_TRIM_THRESHOLD, _KEPT)
    libc.malloc.restype = ctypes.c_void_p
    libc.free(ctypes.c_void_p(libc.malloc(_KEPT // 16)))
    libc.malloc_trim(0)


def cgroup_limit() -> int | None:
    """Bytes that the tightest of this process's control groups may hold; None where none has a limit."""
    return min((limit for _, limit in _limited_groups()), default=None)


def _limited_groups() -> Iterator[tuple[Path, int]]:
    """The directory and limit of each control group around this process that has one, versions 1 and 2.

    Inside a container the path in /proc may be the host's, which is not there: its parents, up to the
    mounted root, are looked at in any case.
    """
    try:
        lines = _OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, name = (
            (_CGROUPS / "memory", "memory.limit_in_bytes") if controllers else (_CGROUPS, "memory.max")
        )
        own = root / path.lstrip("/")
        for group in (own, *own.parents):
            limit = _number(group / name)
            if limit is not None and limit < _UNLIMITED:
                yield group, limit
            if group == root:
                break


def _used(group: Path) -> int:
    """Bytes a control group holds and cannot give back: without the cached pages of files."""
    usage = _number(group / "memory.current") or _number(group / "memory.usage_in_bytes") or 0
    try:
        stat = dict(line.split(" ", 1) for line in (group / "memory.stat").read_text().splitlines())
        prefix = "total_" if "total_active_file" in stat else ""
        cached = sum(int(stat[f"{prefix}{kind}_file"]) for kind in ("active", "inactive"))
    except (OSError, ValueError, KeyError):
        cached = 0
    return max(0, usage - cached)


def _number(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
