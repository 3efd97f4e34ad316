"""Runs in the peer's own environment, one job a process: python -m benchmarks.peers.child JOB (JSON).

Prints one line of JSON at the end: the figures, or {"error": reason}.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.peers.contract import Limits, get_peer
from benchmarks.peers.workloads import Workload, prompts

__all__ = ["main", "peak_resident_bytes"]

_WARM_PROMPT, _WARM_NEW = 32, 4


def peak_resident_bytes() -> int:
    """The largest resident set of this process so far, mapped files included."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")


def _run(job: dict[str, Any]) -> dict[str, Any]:
    """Loads, warms up with a short generation, and measures one workload."""
    work = Workload(**job["workload"])
    peer = get_peer(job["peer"])
    processors = sorted(os.sched_getaffinity(0))[: job["threads"]]
    os.sched_setaffinity(0, processors)  # threads made later stay on them
    limits = Limits(job["threads"], work.sequences, work.prompt + work.new + 8)
    began = time.perf_counter()
    session = peer.load(Path(job["target"]), job["format"], limits)
    load_s = time.perf_counter() - began
    session.generate(prompts(job["vocab"], work.sequences, _WARM_PROMPT), _WARM_NEW)
    cpu, wall = time.process_time(), time.perf_counter()
    timing = session.generate(prompts(job["vocab"], work.sequences, work.prompt), work.new)
    spent, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return asdict(timing) | {
        "prefill_tokens_per_s": work.sequences * work.prompt / timing.prefill_s,
        "decode_tokens_per_s": timing.decode_tokens / timing.decode_s if timing.decode_tokens else None,
        "load_s": load_s,
        "peak_resident_bytes": peak_resident_bytes(),
        "cpu_share": cpu / spent / len(processors),
        "processors": processors,
    }


def _prepare(job: dict[str, Any]) -> dict[str, Any]:
    get_peer(job["peer"]).prepare(Path(job["checkpoint"]), Path(job["target"]), job["format"])
    return {}


def main() -> int:
    """Does the job of argv[1]; the exit code is 0 where it was done."""
    job = json.loads(sys.argv[1])
    # Libraries print to standard output as they like: the answer has a line of its own, at the end.
    try:
        answer = {"run": _run, "prepare": _prepare}[job["job"]](job)
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print("\n" + json.dumps(answer), flush=True)
    os._exit(1 if "error" in answer else 0)  # threads of libraries may not end by themselves


if __name__ == "__main__":
    sys.exit(main())
