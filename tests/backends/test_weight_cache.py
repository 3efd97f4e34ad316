"""Packed weights on disk: whole, undamaged, of this layout, or made again; within a limit."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from gossamer import _native
from gossamer.backends.cpu import packing, weight_cache
from gossamer.backends.cpu.weight_cache import cache_entries, make_room, read_cache, write_cache
from gossamer.checkpoint.weights import DummySource
from gossamer.graph.families import build_graph
from tests.cli.conftest import Cli, cli
from tests.passes.test_weight_formats import DENSE

__all__ = ["cli"]

Fill = Callable[..., tuple[np.ndarray, bool]]
MIB = 1 << 20


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fill:
    """packed(seed) -> (block, from cache), with a cache that takes small models too."""
    monkeypatch.setattr(packing, "_CACHE_FROM", 0)
    pool = _native.Pool(2)

    def fill(seed: str = "dummy-1", *, limit: int | None = None) -> tuple[np.ndarray, bool]:
        graph = build_graph(DENSE | {"vocab_size": 8192})
        source = DummySource(graph)
        monkeypatch.setattr(source, "content_key", lambda: seed)
        places, size = packing.layout(graph)
        block = _native.allocate(size)
        return block, packing.fill_block(
            graph, source, pool, block, places, cache_dir=tmp_path, cache_limit=limit
        )

    return fill


def test_the_cache_serves_the_same_bytes(packed: Fill, tmp_path: Path) -> None:
    first, cached = packed()
    assert not cached and first.nbytes > 2 * MIB
    second, cached = packed()
    assert cached
    assert np.array_equal(first, second)
    assert not packed("another checkpoint")[1]
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    "damage",
    ["truncate", "grow", "empty", "layout", "version", "header", "list", "deep", "bit", "last", "sums"],
)
def test_a_damaged_file_is_made_again(packed: Fill, tmp_path: Path, damage: str) -> None:
    want, _ = packed()
    (path,) = tmp_path.glob("*.packed")
    data = bytearray(path.read_bytes())
    header = json.loads(data[:4096])
    if damage in ("layout", "version"):
        header[damage] -= 1
    lines = {"header": b"{", "list": b"[]", "deep": b"[" * 4096}
    data[:4096] = lines.get(damage, json.dumps(header).encode()).ljust(4096)
    flipped = {"bit": 4096 + MIB + 5, "last": 4096 + want.nbytes - 1, "sums": len(data) - 1}
    if damage in flipped:
        data[flipped[damage]] ^= 16
    path.write_bytes({"truncate": data[:-1], "grow": data + b"x", "empty": b""}.get(damage, data))
    got, cached = packed()
    assert not cached
    assert np.array_equal(got, want)
    assert packed()[1]


def test_a_new_layout_takes_no_old_files(packed: Fill, monkeypatch: pytest.MonkeyPatch) -> None:
    packed()
    monkeypatch.setattr(packing, "_LAYOUT", packing._LAYOUT + 1)
    assert not packed()[1]
    assert packed()[1]


def test_what_a_killed_writer_left_is_swept_away(packed: Fill, tmp_path: Path) -> None:
    old, new = tmp_path / "old.tmp", tmp_path / "new.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    other = tmp_path / "directory.tmp"  # nobody's, and no reason to keep nothing
    other.mkdir()
    os.utime(other, (0, 0))
    packed()
    assert not old.exists() and new.exists()
    assert packed()[1]


def test_an_unwritable_cache_costs_only_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(packing, "_CACHE_FROM", 0)
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the directory should be")
    graph = build_graph(DENSE)
    places, size = packing.layout(graph)
    block = _native.allocate(size)
    source = DummySource(graph)
    assert not packing.fill_block(graph, source, _native.Pool(1), block, places, cache_dir=blocked / "below")
    assert block.any()
    assert os.listdir(tmp_path) == ["blocked"]


@contextlib.contextmanager
def without_privileges() -> Iterator[None]:
    """Root reads everything, so root is somebody else meanwhile."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_file_that_may_not_be_read_is_absent(packed: Fill, tmp_path: Path) -> None:
    packed()
    (path,) = tmp_path.glob("*.packed")
    path.chmod(0)
    with without_privileges():
        assert not packed()[1]
    path.chmod(0o600)
    assert packed()[1]


_WRITER = """
import sys
from pathlib import Path
import numpy as np
from gossamer import _native
from gossamer.backends.cpu.weight_cache import read_cache, write_cache
path, pool = Path(sys.argv[1]), _native.Pool(1)
want = np.random.default_rng(0).integers(0, 256, 5 << 20, np.uint8)
got = _native.allocate(want.nbytes)
found = 0
for _ in range(20):
    write_cache(path, want, 1, pool, model="m", limit=None)
    got[:] = 0
    assert read_cache(path, got, 1, pool) and np.array_equal(got, want)
    path.with_suffix(".packed").touch()
"""


def test_two_processes_may_write_and_read_one_file(tmp_path: Path) -> None:
    path = tmp_path / "both.packed"
    writers = [subprocess.Popen([sys.executable, "-c", _WRITER, str(path)]) for _ in range(2)]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    assert os.listdir(tmp_path) == ["both.packed"]


def test_the_least_recently_used_make_room(packed: Fill, tmp_path: Path) -> None:
    size = packed("a")[0].nbytes + 8192
    limit = 2 * size
    for seed, age in (("a", 300), ("b", 200)):
        before = set(tmp_path.iterdir())
        packed(seed, limit=limit)
        for path in set(tmp_path.iterdir()) - before or before:
            os.utime(path, (1e9 - age, 1e9 - age))
    assert packed("a", limit=limit)[1]  # and is young again
    assert not packed("c", limit=limit)[1]
    assert len(cache_entries(tmp_path)) == 2
    assert packed("a", limit=limit)[1] and packed("c", limit=limit)[1]
    assert not packed("b", limit=MIB)[1] and not packed("b", limit=MIB)[1]  # larger than all the room
    make_room(tmp_path, 0)
    assert cache_entries(tmp_path) == [] and cache_entries(tmp_path / "absent") == []


def test_what_is_not_kept_drives_nothing_out(tmp_path: Path) -> None:
    pool = _native.Pool(1)
    for name, size in (("small", MIB), ("large", 3 * MIB)):
        path = tmp_path / f"{name}.packed"
        write_cache(path, np.ones(size, np.uint8), 1, pool, model=name, limit=2 * MIB)
    assert [entry.model for entry in cache_entries(tmp_path)] == ["small"]


def test_what_is_no_file_is_no_entry(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.packed")
    (tmp_path / "directory.packed").mkdir()
    (tmp_path / "deep.packed").write_bytes(b"[" * 4096)
    assert [(entry.path.name, entry.model) for entry in cache_entries(tmp_path)] == [("deep.packed", "")]


@pytest.mark.parametrize("size", [1, 7, 64, MIB - 1, MIB, MIB + 1, 3 * MIB + 77])
def test_every_bit_and_every_order_counts(size: int) -> None:
    pool = _native.Pool(2)
    data = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    want = weight_cache._checksums(pool, data)
    assert len(want) == -(-size // MIB)
    assert np.array_equal(weight_cache._checksums(_native.Pool(1), data.copy()), want)
    for at in {0, size // 2, size - 1}:
        for bit in (1, 128):
            data[at] ^= bit
            found = weight_cache._checksums(pool, data)
            assert np.flatnonzero(found != want).tolist() == [at // MIB]
            data[at] ^= bit
    if size >= 32:
        swapped = data.copy()
        swapped[:8], swapped[8:16] = data[8:16], data[:8]
        assert weight_cache._checksums(pool, swapped)[0] != want[0]


def test_list_and_clear(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path))
    pool, directory = _native.Pool(1), tmp_path / "packed"
    assert cli("cache", "list", "--json").json["files"] == []
    assert "no packed weights in" in cli("cache", "list").out
    for age, name in ((50, "old"), (5, "new")):
        path = directory / f"{name}.packed"
        write_cache(path, np.ones(MIB, np.uint8), 1, pool, model=f"{name} (int4-g64)", limit=None)
        os.utime(path, (path.stat().st_mtime - age * 3600,) * 2)
    (directory / "bad.packed").write_bytes(b"not a header")
    listed = cli("cache", "list", "--json").json
    assert [f["model"] for f in listed["files"]] == ["", "new (int4-g64)", "old (int4-g64)"]
    text = cli("cache", "list").out
    assert "2 days ago" in text and "5 h ago" in text and "bad.packed: unreadable" in text
    gone = cli("cache", "clear", "--keep", "2MiB", "--json").json
    assert [f["model"] for f in gone["files"]] == ["old (int4-g64)"]
    assert "removed 2 files" in cli("cache", "clear").out
    assert not read_cache(directory / "new.packed", np.empty(MIB, np.uint8), 1, pool)
    monkeypatch.setenv("GOSSAMER_CACHE", "a" * 5000)
    assert "cannot read aaa" in cli("cache", "list").complaint
    assert "size 'all'" in cli("cache", "clear", "--keep", "all").complaint
