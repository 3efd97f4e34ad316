"""Runs everyone on everything, round by round, one process a measurement.

Within a round all contenders run a workload one after another before the next workload begins, and each
round starts with another contender, so that a machine that drifts does so for all of them. What cannot be
installed, prepared or run is kept with its reason.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers.contract import Format, Peer, PeerError
from benchmarks.peers.install import install, interpreter, versions
from benchmarks.peers.workloads import Workload

__all__ = ["Contender", "Settings", "Shape", "call_child", "prepare_all", "run_rounds"]

_PLACE = ("shape", "contender", "workload")
_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """work: where environments and models lie; prefix: a command that runs each measurement (such as a lock
    on a shared machine); run_limit, time_limit: seconds for one process and for all of it."""

    work: Path
    threads: int
    rounds: int
    prefix: tuple[str, ...] = ()
    run_limit: float = 600.0
    time_limit: float | None = None


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's dimensions: its name, its config.json and its checkpoint of random weights."""

    name: str
    config: Path
    checkpoint: Path

    @property
    def vocab(self) -> int:
        """Token ids there are."""
        return int(json.loads(self.config.read_text())["vocab_size"])


@dataclass(slots=True)
class Contender:
    """A peer with one format. broken: why it cannot run at all, by shape ("" for every shape)."""

    module: str
    peer: Peer
    format: Format
    versions: str = ""
    broken: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As tables show it."""
        return f"{self.peer.name} {self.format.name}"

    def target(self, settings: Settings, shape: Shape) -> Path:
        """What the peer loads. Gossamer reads the checkpoint itself."""
        if not self.peer.requirements:
            return shape.checkpoint
        return settings.work / "models" / shape.name / self.module / self.format.name

    def reason(self, shape: Shape) -> str | None:
        """Why it cannot run this shape, if so."""
        return self.broken.get("") or self.broken.get(shape.name)


def call_child(
    contender: Contender, settings: Settings, job: Mapping[str, Any], *, prefix: Sequence[str] = ()
) -> dict[str, Any]:
    """One job in its own process. Gives its answer; raises PeerError with the reason where there is none."""
    python = interpreter(contender.peer, settings.work / contender.module)
    threads = str(settings.threads)
    extra = {name: value.format(threads=threads) for name, value in contender.peer.run_env.items()}
    command = [*prefix, str(python), "-m", "benchmarks.peers.child", json.dumps(job)]
    process = subprocess.Popen(
        command,
        cwd=_ROOT,
        env=os.environ | {"OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"} | extra,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=settings.run_limit)
    except BaseException as error:  # an interrupt too must not leave it running
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            raise PeerError(f"took longer than {settings.run_limit:.0f} s (--run-limit)") from None
        raise
    answer = _last_json(out)
    if answer is None or "error" in answer:
        ended = (
            f"exit code {process.returncode}" if process.returncode >= 0 else f"signal {-process.returncode}"
        )
        last = next((line.strip() for line in reversed(err.splitlines()) if line.strip()), "")
        raise PeerError(answer["error"] if answer else f"{ended}{': ' if last else ''}{last}")
    return answer


def _last_json(text: str) -> dict[str, Any] | None:
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            try:
                found = json.loads(line)
            except ValueError:
                continue
            return found if isinstance(found, dict) else None
    return None


def prepare_all(
    contenders: Sequence[Contender], shapes: Sequence[Shape], settings: Settings, say: Callable[[str], None]
) -> None:
    """Installs every peer and makes every model; failures are written into the contenders."""
    installed: dict[str, str] = {}
    for contender in contenders:
        home = settings.work / contender.module
        if contender.module not in installed:
            say(f"install {contender.peer.name}")
            try:
                install(contender.peer, home, settings.work / f"{contender.module}-install.log")
                installed[contender.module] = ""
            except (PeerError, OSError) as error:
                installed[contender.module] = f"not installed: {error}"
                say(f"  {installed[contender.module]}")
        if reason := installed[contender.module]:
            contender.broken[""] = reason
            continue
        contender.versions = versions(contender.peer, home)
        for shape in shapes:
            target = contender.target(settings, shape)
            done = settings.work / "models" / shape.name / f"{contender.module}-{contender.format.name}.ready"
            if done.is_file() and target.exists():
                continue
            say(f"prepare {contender.name} for {shape.name}")
            for folder in (target.parent, done.parent):
                folder.mkdir(parents=True, exist_ok=True)
            job = {
                "job": "prepare",
                "peer": contender.module,
                "checkpoint": str(shape.checkpoint),
                "target": str(target),
                "format": contender.format.name,
            }
            try:
                call_child(contender, settings, job)
                done.touch()
            except PeerError as error:
                contender.broken[shape.name] = f"not prepared: {error}"
                say(f"  {contender.broken[shape.name]}")


def run_rounds(
    contenders: Sequence[Contender],
    shapes: Sequence[Shape],
    workloads: Sequence[Workload],
    settings: Settings,
    say: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """Every measurement as it comes: {"round", "shape", "contender", "workload", ...the child's figures, or
    "error"}. A contender that failed at a workload is not tried again at it. Ends early at the time limit."""
    began = time.monotonic()
    failed: set[tuple[str, str, str]] = set()
    for number in range(settings.rounds):
        turn = number % max(1, len(contenders))
        for shape in shapes:
            for work in workloads:
                for contender in [*contenders[turn:], *contenders[:turn]]:
                    place = (shape.name, contender.name, work.name)
                    line = {
                        "round": number,
                        **dict(zip(("shape", "contender", "workload"), place, strict=True)),
                    }
                    if reason := contender.reason(shape):
                        if number == 0:
                            yield line | {"error": reason}
                        continue
                    if place in failed:
                        continue
                    if settings.time_limit is not None and time.monotonic() - began > settings.time_limit:
                        if number:
                            return
                        over = f"{settings.time_limit:.0f} s were over (--time-limit)"
                        yield line | {"error": f"not run: {over}"}
                        continue
                    say(f"round {number + 1} of {settings.rounds}: {' '.join(place)}")
                    job = _run_job(contender, shape, work, settings)
                    try:
                        yield line | call_child(contender, settings, job, prefix=settings.prefix)
                    except PeerError as error:
                        failed.add(place)
                        yield line | {"error": str(error)}


def _run_job(contender: Contender, shape: Shape, work: Workload, settings: Settings) -> dict[str, Any]:
    return {
        "job": "run",
        "peer": contender.module,
        "target": str(contender.target(settings, shape)),
        "format": contender.format.name,
        "threads": settings.threads,
        "vocab": shape.vocab,
        "workload": asdict(work),
    }
