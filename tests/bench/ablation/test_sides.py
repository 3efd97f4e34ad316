from __future__ import annotations

import os
import signal
from typing import ClassVar

import pytest

from gossamer.bench.ablation import sides
from gossamer.bench.ablation.arms import base
from gossamer.bench.ablation.mix import SLOW
from gossamer.bench.ablation.sides import Pool, Worker, WorkerError
from gossamer.config import EngineConfig
from gossamer.errors import ConfigError, MemoryBudgetError


def test_an_engine_in_a_process_of_its_own() -> None:
    worker = Worker(base("gossamer/pocket-half"))
    try:
        state = worker.state
        assert state.memory.weights > 1 << 20 and state.resident > state.memory.total
        assert all(line.calls == 0 for line in state.receipt)
        assert worker.run(SLOW, 4).tokens == worker.run(SLOW, 4).tokens
        assert any(line.calls for line in worker.state.receipt)
        os.kill(worker._process.pid, signal.SIGKILL)
        with pytest.raises(WorkerError, match="signal 9"):
            worker.run(SLOW, 5)
    finally:
        worker.close()


def test_a_start_that_is_refused_is_said() -> None:
    with pytest.raises(MemoryBudgetError, match="MiB"):
        Worker(base("gossamer/pocket-half", memory_budget=1 << 20))


class Fake:
    alive: ClassVar[list[str]] = []

    def __init__(self, config: EngineConfig) -> None:
        if config.model == "big" and len(Fake.alive) > 1:
            raise MemoryBudgetError("no room")
        if config.model == "bad":
            raise ConfigError("bad")
        self.config = config
        Fake.alive.append(config.model)

    def close(self) -> None:
        Fake.alive.remove(self.config.model)


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Pool:
    Fake.alive = []
    monkeypatch.setattr(sides, "Worker", Fake)
    return Pool(kept=3)


def test_the_pool_keeps_the_newest(pool: Pool) -> None:
    with pool:
        first = pool.get(base("a"))
        assert pool.get(base("a")) is first
        for name in "bcd":
            pool.get(base(name), beside=first)
        assert Fake.alive == ["a", "c", "d"], "the other side of the arm lives on"
        pool.get(base("c"))
        pool.get(base("e"))
        assert sorted(Fake.alive) == ["c", "d", "e"]
    assert Fake.alive == []


def test_idle_engines_make_room(pool: Pool) -> None:
    with pool:
        beside = pool.get(base("a"))
        pool.get(base("b"))
        pool.get(base("big"), beside=beside)
        assert Fake.alive == ["a", "big"]
        with pytest.raises(ConfigError):
            pool.get(base("bad"))
