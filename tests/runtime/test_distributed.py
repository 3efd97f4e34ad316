"""Collectives between two processes on this machine, and of a rank by itself."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from gossamer.errors import ConfigError, DependencyError  # noqa: E402
from gossamer.runtime.distributed import ALONE, connected  # noqa: E402

RANK = """
import sys, torch
from gossamer.runtime.distributed import connected
rank, size, meeting = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
with connected(rank, size, meeting, backend="gloo", timeout=float(sys.argv[4])) as comm:
    assert (comm.rank, comm.size) == (rank, size)
    for dtype in (torch.float32, torch.bfloat16, torch.int32):
        x = (torch.arange(6).reshape(2, 3) + 10 * rank).to(dtype)
        rows = comm.all_gather(x.T)
        assert rows.shape == (2, 3, 2)
        assert all(torch.equal(rows[r], (torch.arange(6).reshape(2, 3).T + 10 * r).to(dtype)) for r in (0, 1))
        assert torch.equal(comm.broadcast(x.clone(), 1), (torch.arange(6).reshape(2, 3) + 10).to(dtype))
        assert comm.all_reduce(x) is x
        assert torch.equal(x, (2 * torch.arange(6).reshape(2, 3) + 10).to(dtype))
    comm.barrier()
print("done")
"""


def ranks(meeting: str, which: range, timeout: float) -> list[tuple[int, str]]:
    env = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), "2", meeting, str(timeout)],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in which
    ]  # fmt: skip
    try:
        return [(p.wait(100), p.stdout.read() if p.stdout else "") for p in running]
    finally:
        for process in running:
            process.kill()


def test_two_ranks(tmp_path: Path) -> None:
    for code, said in ranks(f"file://{tmp_path}/meeting", range(2), 60):
        assert (code, said.strip().splitlines()[-1:]) == (0, ["done"]), said


def test_a_rank_whose_company_never_comes_says_so(tmp_path: Path) -> None:
    began = time.monotonic()
    ((code, said),) = ranks(f"file://{tmp_path}/meeting", range(1), 2)
    assert code == 1 and "Error" in said and time.monotonic() - began < 60


def test_one_rank_is_by_itself() -> None:
    x = torch.arange(4.0)
    with connected(0, 1, "nowhere", backend="nccl") as comm:
        assert comm is ALONE
        assert comm.all_reduce(x) is x and comm.broadcast(x) is x and torch.equal(comm.all_gather(x), x[None])
        comm.barrier()


def test_ranks_that_cannot_be_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="rank 2 is not one of 2"), connected(2, 2, "x", backend="gloo"):
        pass
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: False)
    with pytest.raises(DependencyError, match="gloo runs here"), connected(0, 2, "x", backend="nccl"):
        pass
