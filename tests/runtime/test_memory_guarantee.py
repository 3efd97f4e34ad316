"""The byte plan is a bound: under a random load of everything at once, a process never holds more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from gossamer.llm import engine_config
from gossamer.planner.memory import plan_memory
from gossamer.planner.model import open_planned
from tests.runtime.stress import OPTIONS

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")


def held(pid: int) -> int:
    """Bytes of a process that belong to no file; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * sum(int(x.split()[1]) for x in lines if x.startswith(("RssAnon", "RssShmem")))


def stress(seconds: float) -> tuple[dict[str, Any], int]:
    """What the load did, and the most that its process held from its first moment on."""
    command = [sys.executable, "-m", "tests.runtime.stress", str(seconds)]
    path = os.pathsep.join(filter(None, [str(ROOT), *sys.path]))
    peak, ended = [0], threading.Event()
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    ) as process:

        def watch() -> None:
            while not ended.wait(0.005):
                peak[0] = max(peak[0], held(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            said, _ = process.communicate(timeout=seconds + 240)
        finally:
            process.kill()
            ended.set()
            watcher.join()
    assert process.returncode == 0
    return json.loads(said), peak[0]


def check(seconds: float) -> None:
    config = engine_config(**OPTIONS)
    plan = plan_memory(open_planned(config), config, kind="library").total
    did, peak = stress(seconds)
    print(did, f"peak {peak / 2**20:.1f} MiB of {plan / 2**20:.1f} planned")
    for what in ("finished", "aborted", "preempted", "shared", "drafted"):
        assert did[what] > 0, f"the load never {what}"
    assert peak <= plan
    assert peak <= did["promised"]
    assert peak > 0.8 * plan, "the plan is a bound so loose that it says nothing"


@pytest.mark.timeout(280)
def test_a_random_load_stays_within_the_plan() -> None:
    check(float(os.environ.get("GOSSAMER_STRESS_SECONDS", "60")) / 4)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_a_long_random_load_stays_within_the_plan() -> None:
    check(float(os.environ.get("GOSSAMER_STRESS_SECONDS", "60")))
