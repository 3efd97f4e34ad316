"""The safetensors reader against the reference library, and against every lie a header can tell."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gossamer.checkpoint.safetensors import DTYPES, Checkpoint, SafetensorsFile
from gossamer.checkpoint.safetensors_writer import LazyTensor, write_safetensors
from gossamer.errors import CheckpointError


def save(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(shape: Any = (2,), begin: Any = 0, end: Any = 8, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_every_dtype_round_trips(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {}
    for name, dtype in DTYPES.items():
        raw = rng.integers(0, 2 if name == "BOOL" else 256, 3 * 5 * dtype.itemsize, dtype=np.uint8)
        tensors[name] = raw.view(dtype).reshape(3, 5)
    tensors |= {"scalar": np.float32(3.5).reshape(()), "empty": np.empty((0, 4), np.float16)}
    tensors["strided"] = np.arange(12, dtype=">i4").reshape(3, 4).T
    write_safetensors(tmp_path / "x.safetensors", tensors, {"made": "here"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert set(file.names()) == set(tensors) and file.metadata == {"made": "here"}
    for name, tensor in tensors.items():
        got = file.read(name)
        assert got.shape == tensor.shape and got.flags.aligned
        assert not got.flags.owndata or name == "empty"
        assert got.tobytes() == np.ascontiguousarray(tensor, got.dtype).tobytes()
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_reads_what_the_reference_library_writes_and_back(tmp_path: Path) -> None:
    reference = pytest.importorskip("safetensors.numpy")
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(3, dtype=np.int8)}
    reference.save_file(tensors, tmp_path / "ref.safetensors")
    file = SafetensorsFile(tmp_path / "ref.safetensors")
    assert all(np.array_equal(file.read(name), tensor) for name, tensor in tensors.items())
    write_safetensors(tmp_path / "own.safetensors", tensors)
    back = reference.load_file(tmp_path / "own.safetensors")
    assert all(np.array_equal(back[name], tensor) for name, tensor in tensors.items())


def test_rows_views_and_release(tmp_path: Path) -> None:
    table = np.arange(4096 * 8, dtype=np.float32).reshape(4096, 8)
    write_safetensors(tmp_path / "x.safetensors", {"t": table, "s": np.array(1.0)})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    view = file.read("t")
    assert np.array_equal(file.read_rows("t", 10, 20), table[10:20])
    assert file.read_rows("t", 7, 7).shape == (0, 8)
    file.release("t")
    assert np.array_equal(view, table)
    with pytest.raises(ValueError, match="read-only"):
        view[0, 0] = 1
    for name, start, stop in (("t", -1, 2), ("t", 3, 2), ("t", 0, 4097), ("s", 0, 1)):
        with pytest.raises(CheckpointError, match="rows"):
            file.read_rows(name, start, stop)
    with pytest.raises(CheckpointError, match="no tensor 'u'"):
        file.read("u")


def test_unaligned_tensor_is_copied_to_aligned_memory(tmp_path: Path) -> None:
    data = b"\x07" + struct.pack("<2f", 1.5, -2.0)
    header = {"a": entry([1], 0, 1, "U8"), "b": entry([2], 1, 9)}
    text = json.dumps(header).encode()
    file = SafetensorsFile(save(tmp_path / "x.safetensors", text + b" " * (-len(text) % 8), data))
    assert file.read("b").flags.aligned and file.read("b").tolist() == [1.5, -2.0]


HOSTILE = {
    "empty file": (None, "few for a header"),
    "header longer than the file": ((b"{}", b"", 999), "only 2 bytes follow"),
    "header longer than allowed": ((b"{}", b"", 2**63), "above the 100000000"),
    "not an object": ((b"[]",), "starts with"),
    "not JSON": ((b"{nope}",), "not valid JSON"),
    "not UTF-8": ((b'{"\xff": 1}',), "not UTF-8"),
    "too deep": ((b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",), "nested too deeply"),
    "key twice": ((b'{"a": 1, "a": 2}',), "'a' is given twice"),
    "inner key twice": ((b'{"a": {"dtype": "F32", "dtype": "F64"}}',), "'dtype' is given twice"),
    "entry is no object": (({"a": 1},), "needs exactly"),
    "entry with more": (({"a": {**entry(), "x": 1}}, bytes(8)), "needs exactly"),
    "unknown dtype": (({"a": entry(dtype="F31")}, bytes(8)), "'F31' is unknown"),
    "dtype is no string": (({"a": entry(dtype=["F32"])}, bytes(8)), "is unknown"),
    "negative dimension": (({"a": entry([-2])}, bytes(8)), r"shape \[-2\]"),
    "two negatives": (({"a": entry([-1, -2])}, bytes(8)), "shape"),
    "huge dimension": (({"a": entry([10**30])}, bytes(8)), "shape"),
    "product overflows": (({"a": entry([2**32, 2**32, 2])}, bytes(8)), "needs 147573952589676412928 bytes"),
    "product overflows to fit": (({"a": entry([2**62, 8, 2])}, bytes(8)), "needs"),
    "fraction": (({"a": entry([2.0])}, bytes(8)), "shape"),
    "bool as size": (({"a": entry([True, 2])}, bytes(8)), "shape"),
    "too many dimensions": (({"a": entry([1] * 33)}, bytes(4)), "shape"),
    "number of 5000 digits": ((b'{"a": ' + b"9" * 5000 + b"}",), "not valid JSON"),
    "negative offset": (({"a": entry([2], -8, 0)}, bytes(8)), "data_offsets"),
    "offsets reversed": (({"a": entry([2], 8, 0)}, bytes(8)), "data_offsets"),
    "three offsets": (({"a": {**entry(), "data_offsets": [0, 4, 8]}}, bytes(8)), "data_offsets"),
    "truncated": (({"a": entry()}, bytes(7)), "truncated"),
    "size unlike shape": (({"a": entry([3])}, bytes(8)), "needs 12 bytes, the offsets hold 8"),
    "overlap": (({"a": entry(), "b": entry([2], 4, 12)}, bytes(12)), "overlaps tensor 'a'"),
    "same bytes twice": (({"a": entry(), "b": entry()}, bytes(8)), "overlaps"),
    "hole": (({"a": entry(), "b": entry([2], 12, 20)}, bytes(20)), "hole after tensor 'a'"),
    "hole at the start": (({"a": entry([2], 4, 12)}, bytes(12)), "hole after the header"),
    "bytes at the end": (({"a": entry()}, bytes(9)), "1 bytes after the last tensor"),
    "metadata not strings": (({"__metadata__": {"a": 1}},), "__metadata__"),
    "infinite": ((b'{"a": Infinity}',), "not valid JSON"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_header_is_a_clear_error(tmp_path: Path, case: str) -> None:
    content, message = HOSTILE[case]
    path = tmp_path / "evil.safetensors"
    if content is None:
        path.write_bytes(b"")
    else:
        save(path, *content)
    with pytest.raises(CheckpointError, match=message) as caught:
        SafetensorsFile(path)
    assert "evil.safetensors" in str(caught.value) and len(str(caught.value)) < 600


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4),
       cut=st.integers(0, 40))  # fmt: skip
def test_damage_anywhere_is_an_error_or_harmless(tmp_path: Path, flips: list[Any], cut: int) -> None:
    path, whole = tmp_path / "x.safetensors", tmp_path / "whole.safetensors"
    if not whole.exists():
        write_safetensors(whole, {"a": np.ones((3, 4), np.float32), "b": np.zeros(5, ml_dtypes.bfloat16)})
    data = bytearray(whole.read_bytes())
    for at, value in flips:
        data[at % len(data)] = value
    path.write_bytes(data[: len(data) - cut])
    try:
        file = SafetensorsFile(path)
    except CheckpointError:
        return
    for name in file.names():
        assert file.read(name).nbytes == file.info(name).nbytes


def test_missing_file_and_directory(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(CheckpointError, match="cannot read"):
            SafetensorsFile(path)


def test_write_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": np.ones(2, np.float32)})
    before = path.read_bytes()
    lazy = LazyTensor("F32", (3,), lambda: np.ones(4, np.float32))
    with pytest.raises(CheckpointError, match="announced as float32"):
        write_safetensors(path, {"a": lazy})
    for bad in ({"a": np.ones(2, np.complex64)}, {"__metadata__": np.ones(2)}):
        with pytest.raises(CheckpointError):
            write_safetensors(path, bad)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_lazy_tensors_live_one_at_a_time(tmp_path: Path) -> None:
    log: list[str] = []

    def lazy(name: str) -> LazyTensor:
        return LazyTensor("F32", (2,), lambda: log.append(name) or np.full(2, len(log), np.float32))

    write_safetensors(tmp_path / "x.safetensors", {"b": lazy("b"), "a": lazy("a")})
    assert log == ["a", "b"]
    assert SafetensorsFile(tmp_path / "x.safetensors").read("b").tolist() == [2, 2]


def sharded(directory: Path) -> dict[str, np.ndarray[Any, Any]]:
    parts = [{"a": np.arange(4.0)}, {"b": np.arange(6, dtype=np.float32).reshape(3, 2), "c": np.arange(2.0)}]
    places = {}
    for n, part in enumerate(parts):
        write_safetensors(directory / f"model-{n}.safetensors", part)
        places |= dict.fromkeys(part, f"model-{n}.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return parts[0] | parts[1]


def test_sharded_checkpoint(tmp_path: Path) -> None:
    tensors = sharded(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    assert sorted(checkpoint.names()) == ["a", "b", "c"] and "a" in checkpoint
    assert all(np.array_equal(checkpoint.read(name), tensor) for name, tensor in tensors.items())
    assert checkpoint.read_rows("b", 1, 2).tolist() == [[2, 3]] and checkpoint.info("b").shape == (3, 2)
    with pytest.raises(CheckpointError, match="did you mean"):
        checkpoint.read("aa")


def test_content_key_follows_bytes_not_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = [tmp_path / name / "model.safetensors" for name in ("one", "two", "three")]
    for path, value in zip(places, (1, 1, 2), strict=True):
        path.parent.mkdir()
        tensor = np.zeros(50_000, np.float32)
        tensor[-1] = value
        write_safetensors(path, {"a": tensor})
        os.utime(path, (0, 0))

    def keys() -> list[str]:
        return [Checkpoint(path.parent).content_key() for path in places]

    one, two, three = keys()
    assert one == two != three
    # Of large files only samples are hashed, so the time of the last change counts too.
    monkeypatch.setattr("gossamer.checkpoint.safetensors._HASH_WHOLE", 0)
    one, two, three = keys()
    assert one == two != three
    os.utime(places[0], (1, 1))
    assert keys()[0] != two == keys()[1]


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ("../evil.safetensors", "only the name"),
        ("/etc/evil.safetensors", "only the name"),
        ("sub/evil.safetensors", "only the name"),
        ("pytorch_model.bin", "only the name"),
        (7, "only the name"),
        ("model-9.safetensors", "'model-9.safetensors'.* is missing"),
        ("model-1.safetensors", "tensor 'a' is not in 'model-1.safetensors'"),
    ],
)
def test_hostile_index(tmp_path: Path, shard: Any, message: str) -> None:
    sharded(tmp_path)
    write_safetensors(tmp_path.parent / "evil.safetensors", {"a": np.ones(1)})
    places = {"a": shard, "b": "model-1.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {}}', "[", '{"a": 1, "a": 1}'])
def test_damaged_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        Checkpoint(tmp_path)


def test_pickle_is_refused_and_absence_explained(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"looked for model.safetensors and model.safetensors.index"):
        Checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="not a directory"):
        Checkpoint(tmp_path / "absent")
    for name in ("pytorch_model.bin", "consolidated.00.pth", "model.ckpt", "weights.pkl", "model.pt"):
        (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
        with pytest.raises(CheckpointError, match=f"(?s)pickle.*{name}.*refused.*save_pretrained"):
            Checkpoint(tmp_path)
        (tmp_path / name).unlink()


def test_real_checkpoint(shared: Path) -> None:
    checkpoint = Checkpoint(shared / "models" / "stories260K")
    assert checkpoint.read("model.embed_tokens.weight").shape == (512, 64)
    assert len(checkpoint.content_key()) == 32
