"""What a process takes beside its programs: measured once, remembered, and a sum of parts."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gossamer.backends.cpu.plan import ProgramPlan, StepShape, plan_program
from gossamer.config import EngineConfig
from gossamer.errors import DependencyError
from gossamer.memory import anonymous_bytes, give_back
from gossamer.runtime import process_memory
from gossamer.runtime.process_memory import growth_bytes, own_kind, resting_bytes
from tests.graph.small import llama

MIB = 1 << 20


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path))
    resting_bytes.cache_clear()
    yield tmp_path / "process-memory.json"
    resting_bytes.cache_clear()


def test_it_is_measured_once_and_remembered(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_cache.write_text("{damaged")
    measured = resting_bytes("library")
    assert 10 * MIB < measured < 200 * MIB
    resting_bytes.cache_clear()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("it was measured again"))
    assert resting_bytes("library") == measured


def test_libraries_that_are_missing_are_named(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(process_memory._IMPORTS, "server", "no_such_library")
    with pytest.raises(DependencyError, match="no_such_library"):
        resting_bytes("server")


def plan(vocab: int = 101, **shape: Any) -> ProgramPlan:
    steps = {"tokens": 32, "rows": 4, "spans": 4, "page_size": 16, "pages": 64, "table": 4} | shape
    return plan_program(llama(vocab_size=vocab), StepShape(kv_dtype="bf16", **steps), isa="scalar", threads=1)


def growth(target: ProgramPlan, draft: ProgramPlan | None = None, **changes: Any) -> int:
    given: dict[str, Any] = {"tokenizer": False, "kind": "library"} | changes
    return growth_bytes(target, draft, EngineConfig(model="m"), **given)


def test_it_grows_with_what_takes_memory() -> None:
    least = growth(plan())
    assert least < growth(plan(spans=40))
    assert least < growth(plan(pages=6400)) < growth(plan(pages=6400), kind="server")
    assert least < growth(plan(), plan())
    assert least < growth(plan(), tokenizer=True)
    small, large = (growth(plan(vocab), tokenizer=True) for vocab in (32000, 152000))
    assert 100 * MIB < large - small < 130 * MIB


def test_loading_counts_where_it_takes_more_than_the_steps_will() -> None:
    wide = plan(150_000, pages=4)
    steps = wide.memory.kv + wide.memory.arena + wide.memory.workspace
    assert growth(wide) > wide.loading - steps
    assert wide.loading > plan().loading


def test_memory_that_was_freed_is_given_back() -> None:
    held = anonymous_bytes()
    blocks = [np.ones(100_000, np.uint8) for _ in range(400)]
    assert anonymous_bytes() - held > 20 * MIB
    keep = blocks[-1]
    del blocks
    give_back()
    assert anonymous_bytes() - held < 12 * MIB
    assert keep.any()


def test_this_process_is_of_a_kind() -> None:
    assert own_kind() in ("library", "command", "server")
