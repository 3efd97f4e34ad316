"""The container: what the gguf package writes is read, and no bytes at all are trusted."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.checkpoint.gguf_file import GGUFFile
from gossamer.errors import CheckpointError, GossamerError

VALUES: dict[str, tuple[str, Any]] = {
    "a.u8": ("uint8", 200), "a.i8": ("int8", -5), "a.u16": ("uint16", 60000), "a.i16": ("int16", -3),
    "a.u32": ("uint32", 2**32 - 1), "a.i32": ("int32", -7), "a.f32": ("float32", 0.5),
    "a.bool": ("bool", True), "a.str": ("string", "héllo ▁"), "a.u64": ("uint64", 2**63),
    "a.i64": ("int64", -(2**40)), "a.f64": ("float64", 1e-300), "a.texts": ("array", ["x", "", "▁y"]),
    "a.floats": ("array", [0.25, -1.0]),
}  # fmt: skip
MATRIX = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file of the gguf package with a value of every type and two tensors."""
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, (kind, value) in VALUES.items():
        getattr(writer, f"add_{kind}")(key, value)
    writer.add_tensor("a", MATRIX)
    writer.add_tensor("b", np.full((3, 64), 7, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.fixture(scope="module")
def damaged_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged") / "m.gguf"


def opened(tmp_path: Path, data: bytes) -> GGUFFile:
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    return GGUFFile(path)


def test_what_the_gguf_package_writes_is_read(tmp_path: Path, whole: bytes) -> None:
    file = opened(tmp_path, whole)
    assert {k: v for k, v in file.metadata.items() if k.startswith("a.")} == {
        k: v for k, (_, v) in VALUES.items()
    }
    a, b = file.tensors["a"], file.tensors["b"]
    assert (a.block.name, a.shape, b.block.name, b.shape) == ("F32", (2, 3), "F16", (3, 64))
    assert file.map[a.start : a.stop] == MATRIX.tobytes()


def edit(data: bytes, at: int, value: bytes) -> bytes:
    return data[:at] + value + data[at + len(value) :]


@pytest.mark.parametrize(
    "at,value,message",
    [
        (0, b"GGML", "begins with"),
        (4, struct.pack("<I", 1), "version 1"),
        (4, struct.pack(">I", 3), "big-endian"),
        (8, struct.pack("<Q", 2**63), "tensors"),
        (16, struct.pack("<Q", 2**40), "keys"),
        (24, struct.pack("<Q", 2**62), "above"),
        (24, struct.pack("<Q", 60000), "are left"),
    ],
)
def test_counts_and_lengths_are_checked(
    tmp_path: Path, whole: bytes, at: int, value: bytes, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        opened(tmp_path, edit(whole, at, value))


def header(pairs: bytes = b"", keys: int = 0, tensors: bytes = b"", count: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, count, keys) + pairs + tensors + b"\0" * 256


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def tensor(name: str, *dims: int, kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


HOSTILE = {
    "is there twice": header(2 * (text("k") + struct.pack("<IB", 0, 1)), 2),
    "unknown type": header(text("k") + struct.pack("<I", 99), 1),
    "neither 0 nor 1": header(text("k") + struct.pack("<IB", 7, 2), 1),
    "more than the file": header(text("k") + struct.pack("<IIQ", 9, 8, 2**60), 1),
    "deeper than": header(text("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9, 1),
    "entry that ends": header(text("k") + struct.pack("<IIQQ", 9, 8, 1, 2**63), 1),
    "general.alignment": header(text("general.alignment") + struct.pack("<II", 4, 24), 1),
    "0 extents": header(tensors=tensor("t"), count=1),
    "extents from 1": header(tensors=tensor("t", 0, 4), count=1),
    "Q2_K": header(tensors=tensor("t", 256, kind=10), count=1),
    "type 1000": header(tensors=tensor("t", 256, kind=1000), count=1),
    "whole blocks": header(tensors=tensor("t", 33, kind=8), count=1),
    "ends at": header(tensors=tensor("t", 2**31, 2**31, 2**31, 2**31), count=1),
    "multiples of 32": header(tensors=tensor("t", 4, offset=8), count=1),
    "overlaps": header(tensors=tensor("t", 16) + tensor("u", 4, offset=32), count=2),
    "'t' is there twice": header(tensors=tensor("t", 4) + tensor("t", 4, offset=32), count=2),
    "not UTF-8": header(struct.pack("<Q", 1) + b"\xff" + struct.pack("<IB", 0, 1), 1),
}


@pytest.mark.parametrize("message", HOSTILE)
def test_what_the_format_forbids_is_named(tmp_path: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        opened(tmp_path, HOSTILE[message])


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_damaged_files_are_refused_or_read_and_never_fail_otherwise(
    damaged_file: Path, whole: bytes, data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(whole) - 1))
    what = data.draw(st.binary(min_size=1, max_size=8) | st.sampled_from([b"\xff" * 8, b"\0" * 8]))
    damaged = edit(whole, at, what)[: data.draw(st.integers(0, len(whole)) | st.just(len(whole)))]
    damaged_file.write_bytes(damaged)
    try:
        file = GGUFFile(damaged_file)
    except GossamerError:
        return
    for found in file.tensors.values():
        assert file.header_size <= found.start < found.stop <= file.size
