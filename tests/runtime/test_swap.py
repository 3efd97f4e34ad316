"""The slower tier: pages go out and come back with every bit, and a disk that cannot is an error."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.config import EngineConfig, PagedAttention
from gossamer.engine.request import SamplingParams
from gossamer.engine.step import KVOp, Sampling, Span, StepPlan
from gossamer.errors import ConfigError
from gossamer.runtime.start import start
from gossamer.runtime.swap import SwapFile
from tests.graph.small import llama_config


def pools(*shapes: tuple[int, int, int]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, shape, np.uint8) for shape in shapes]


@settings(max_examples=30, deadline=None)
@given(
    moves=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 3), st.integers(0, 4)), max_size=20),
    short=st.integers(1, 5000),
)
def test_pages_come_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, moves: list[tuple[int, int, int]], short: int
) -> None:
    """Whatever lies in the other slots, and however little the system takes at once."""
    own = pools((3, 4, 700), (1, 4, 64))
    file = SwapFile(tmp_path_factory.mktemp("swap"), 5 * (3 * 700 + 64) + 11, own)
    assert file.slots == 5
    with pytest.MonkeyPatch.context() as patch:
        write, read = os.pwrite, os.preadv
        patch.setattr(os, "pwrite", lambda fd, data, at: write(fd, data[:short], at))
        patch.setattr(os, "preadv", lambda fd, to, at: read(fd, [to[0][:short]], at))
        held: dict[tuple[int, int], np.ndarray] = {}
        for group, page, slot in moves:
            if (group, slot) in held:
                file.read(group, page, slot)
                assert np.array_equal(own[group][:, page], held.pop((group, slot)))
            else:
                file.write(group, page, slot)
                held[group, slot] = own[group][:, page].copy()
                own[group][:, page] += 1
        for (group, slot), page in held.items():
            file.read(group, 0, slot)
            assert np.array_equal(own[group][:, 0], page)
    file.close()
    file.close()


def test_the_file_has_no_name_and_all_its_blocks(tmp_path: Path) -> None:
    before = os.statvfs(tmp_path).f_bavail
    file = SwapFile(tmp_path, 64 << 20, pools((2, 4, 1024)))
    assert not list(tmp_path.iterdir())
    assert os.fstat(file._file).st_blocks * 512 >= file.bytes == 64 << 20
    file.close()
    assert before > 0


def test_a_disk_that_is_too_small_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="free; lower it"):
        SwapFile(tmp_path, 1 << 60, pools((2, 4, 1024)))
    with pytest.raises(ConfigError, match="not one KV page of 2048 bytes"):
        SwapFile(tmp_path, 2047, pools((2, 4, 1024)))
    with pytest.raises(ConfigError, match="cannot be made"):
        SwapFile(Path("/proc/nowhere"), 4096, pools((2, 4, 1024)))


def test_a_disk_that_fails_is_an_error_with_its_reason(tmp_path: Path, monkeypatch: Any) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ConfigError, match="No space left"):
        SwapFile(tmp_path, 4096, pools((2, 4, 1024)))
    monkeypatch.undo()
    file = SwapFile(tmp_path, 4096, pools((2, 4, 1024)))
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ConfigError, match="No space left"):
        file.write(0, 0, 0)
    os.ftruncate(file._file, 0)
    with pytest.raises(ConfigError, match="ended early"):
        file.read(0, 0, 1)


@pytest.mark.parametrize("kv_dtype", ["f32", "f16", "bf16", "int8", "int4"])
def test_a_sequence_goes_on_where_it_was_swapped(kv_dtype: Any, tmp_path: Path) -> None:
    """Out, its pages overwritten by another's, in to other pages: the same bits as if it had stayed."""
    fields = llama_config(architectures=["Qwen2ForCausalLM"], sliding_window=8, use_sliding_window=True)
    (tmp_path / "config.json").write_text(json.dumps(fields | {"max_window_layers": 1}))
    config = EngineConfig(
        model=str(tmp_path), load_format="dummy", max_model_len=64, max_num_seqs=2, kv_dtype=kv_dtype,
        paged_attention=PagedAttention(swap_bytes=1 << 20, swap_directory=str(tmp_path)),
    )  # fmt: skip
    started = start(config)
    executor = started.executor
    limits = executor.limits
    assert len(limits.swap_pages) == 2 and limits.swap_pages[0] == limits.swap_pages[1] > 8
    assert 0 < started.swap_bytes <= 1 << 20
    sampling = Sampling(SamplingParams(temperature=0, logprobs=5), 0, (), ())

    def step(sequence: int, tokens: range, start: int, pages: list[int], *ops: KVOp) -> Any:
        span = Span(sequence, tokens, start, (len(tokens) - 1,), (pages, pages), sampling)
        return executor.collect(executor.submit(StepPlan((span,), ops)))

    def moves(kind: Any, *pairs: tuple[int, int]) -> list[KVOp]:
        return [KVOp(kind, group, a, b, 16) for group in range(2) for a, b in pairs]

    step(0, range(3, 30), 0, [0, 1])
    stayed = step(0, range(1), 27, [0, 1])
    out = step(1, range(20, 60), 0, [0, 1, 2], *moves("out", (0, 7), (1, 3)))
    assert out.move_seconds > 0
    back = step(0, range(1), 27, [4, 5], *moves("in", (7, 4), (3, 5)))
    assert back.rows == stayed.rows
    executor.close()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"swap_bytes": 0}, "at least 1"),
        ({"swap_directory": "/tmp"}, "without swap_bytes"),
    ],
)
def test_tiers_that_cannot_be_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        PagedAttention(**given)
