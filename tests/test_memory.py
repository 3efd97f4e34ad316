"""What is left of the machine, of the control groups around the process and of its address space."""

from __future__ import annotations

import resource
from pathlib import Path

import psutil
import pytest

from gossamer import memory


@pytest.fixture(autouse=True)
def a_machine_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """64 GiB available; control groups and /proc are files in tmp_path."""
    free = psutil.virtual_memory()._replace(available=64 << 30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY,) * 2)
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "_OWN_CGROUPS", tmp_path / "self")


def group(path: Path, **files: str) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (path / f"memory.{name}").write_text(text)


def test_without_limits_it_is_what_the_machine_has(tmp_path: Path) -> None:
    assert (memory.available_memory(), memory.cgroup_limit()) == (64 << 30, None)
    (tmp_path / "self").write_text("0::/\n")
    group(tmp_path / "cgroup", max="max\n")
    assert (memory.available_memory(), memory.cgroup_limit()) == (64 << 30, None)


def test_the_tightest_group_counts_and_cached_files_do_not(tmp_path: Path) -> None:
    (tmp_path / "self").write_text("0::/slice/service\n")
    group(
        tmp_path / "cgroup/slice",
        max="1000",
        current="700",
        stat="anon 500\nactive_file 50\ninactive_file 50\n",
    )
    group(tmp_path / "cgroup/slice/service", max="800", current="100", stat="anon 100\n")
    assert (memory.available_memory(), memory.cgroup_limit()) == (400, 800)


def test_version_one_and_a_path_of_the_host(tmp_path: Path) -> None:
    (tmp_path / "self").write_text("5:cpu,cpuacct:/docker/4f\n4:memory:/docker/4f\n")
    stat = "active_file 1\ninactive_file 1\ntotal_active_file 100\ntotal_inactive_file 100\n"
    group(tmp_path / "cgroup/memory", limit_in_bytes="900\n", usage_in_bytes="600\n", stat=stat)
    assert (memory.available_memory(), memory.cgroup_limit()) == (500, 900)
    group(tmp_path / "cgroup/memory", limit_in_bytes="9223372036854771712\n")
    assert memory.cgroup_limit() is None


def test_a_group_past_its_limit_has_nothing_left(tmp_path: Path) -> None:
    (tmp_path / "self").write_text("0::/\n")
    group(tmp_path / "cgroup", max="100", current="150")
    assert memory.available_memory() == 0


def test_address_space(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = psutil.Process().memory_info().vms
    monkeypatch.setattr(resource, "getrlimit", lambda which: (taken + (1 << 30), resource.RLIM_INFINITY))
    assert 0 < memory.available_memory() <= 1 << 30
