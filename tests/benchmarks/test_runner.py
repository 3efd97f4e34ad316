"""The runner with a peer that works and peers that fail in every way: each leaves its reason."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers.contract import PeerError
from benchmarks.peers.install import install, interpreter, versions
from benchmarks.peers.runner import Contender, Settings, Shape, call_child, prepare_all, run_rounds
from benchmarks.peers.workloads import WORKLOADS, prompts
from tests.benchmarks import fake_peer

MODULE = "tests.benchmarks.fake_peer"


def contenders(*names: str) -> list[Contender]:
    return [Contender(MODULE, fake_peer.PEER, f) for f in fake_peer.PEER.formats if f.name in names]


@pytest.fixture
def shape(tmp_path: Path) -> Shape:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"vocab_size": 100}))
    (tmp_path / "checkpoint").mkdir()
    return Shape("tiny", config, tmp_path / "checkpoint")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(work=tmp_path, threads=1, rounds=2, run_limit=20.0)


def run(some: list[Contender], shape: Shape, settings: Settings, *works: str) -> list[dict[str, Any]]:
    said: list[str] = []
    prepare_all(some, [shape], settings, said.append)
    return list(run_rounds(some, [shape], [WORKLOADS[w] for w in works], settings, said.append))


def test_rounds_interleave_and_failures_keep_their_reason(shape: Shape, settings: Settings) -> None:
    lines = run(contenders("works", "raises", "dies", "unprepared"), shape, settings, "decode1")
    assert [(line["round"], line["contender"]) for line in lines] == [
        (0, "Fake works"), (0, "Fake raises"), (0, "Fake dies"), (0, "Fake unprepared"), (1, "Fake works"),
    ]  # fmt: skip
    works, raises, dies, unprepared, _ = lines
    assert works["decode_tokens_per_s"] == 63 / 2.0 and works["prefill_tokens_per_s"] == 128 / 0.5
    assert works["load_s"] >= 0 and works["peak_resident_bytes"] > 1 << 20 and len(works["processors"]) == 1
    assert raises["error"] == "PeerError: the weights are upside down"
    assert dies["error"] == "signal 9: about to die"
    assert unprepared["error"] == "not prepared: PeerError: no exporter for this shape"


def test_a_process_that_hangs_is_ended(shape: Shape, settings: Settings) -> None:
    (line,) = run(contenders("hangs"), shape, replace(settings, run_limit=3.0, rounds=1), "decode1")
    assert line["error"] == "took longer than 3 s (--run-limit)"


def test_time_limit_says_what_was_not_run(shape: Shape, settings: Settings) -> None:
    lines = run(contenders("works"), shape, replace(settings, time_limit=0.0), "decode1", "dec8")
    assert [line["workload"] for line in lines] == ["decode1", "dec8"]
    assert all(line["error"] == "not run: 0 s were over (--time-limit)" for line in lines)


def test_prefix_stands_before_the_measurement(shape: Shape, settings: Settings, tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    prefix = ("sh", "-c", f'echo here >> {seen}; exec "$0" "$@"')
    (line, _) = run(contenders("works"), shape, replace(settings, prefix=prefix), "decode1")
    assert "error" not in line and seen.read_text() == "here\nhere\n"


def test_a_missing_interpreter_is_a_reason(shape: Shape, settings: Settings) -> None:
    (works,) = contenders("works")
    absent = replace(works.peer, requirements=("something",))
    with pytest.raises(FileNotFoundError):
        call_child(replace_peer(works, absent), settings, {})


def replace_peer(contender: Contender, peer: Any) -> Contender:
    return Contender(contender.module, peer, contender.format)


def test_install_failure_names_pips_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: list[str], **kwargs: Any) -> Any:
        kwargs["stdout"].write("Collecting nothing\nERROR: No matching distribution\ntrailing words\n")
        return subprocess.CompletedProcess(command, 1)

    peer = replace(fake_peer.PEER, requirements=("nothing==1",))
    monkeypatch.setattr("benchmarks.peers.install.subprocess.run", pip)
    with pytest.raises(PeerError, match="pip install failed: ERROR: No matching distribution"):
        install(peer, tmp_path / "home", tmp_path / "log")
    assert not (tmp_path / "home" / "installed.txt").exists()


def test_install_happens_once_for_the_same_requirements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []

    def pip(command: list[str], **kwargs: Any) -> Any:
        calls.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr("benchmarks.peers.install.subprocess.run", pip)
    peer = replace(fake_peer.PEER, requirements=("one",), unwanted=("two",))
    for _ in range(2):
        install(peer, tmp_path, tmp_path / "log")
    assert [c[1:4] for c in calls] == [
        ["-m", "venv", str(tmp_path / "venv")], ["-m", "pip", "install"], ["-m", "pip", "uninstall"]
    ]  # fmt: skip
    install(replace(peer, requirements=("other",)), tmp_path, tmp_path / "log")
    assert len(calls) > 3


def test_this_environment_serves_a_peer_without_requirements(tmp_path: Path) -> None:
    import sys

    assert interpreter(fake_peer.PEER, tmp_path) == Path(sys.executable)
    assert versions(fake_peer.PEER, tmp_path).startswith("gossamer ")


def test_prompts_are_the_same_for_everyone_and_differ_by_sequence() -> None:
    first, again = prompts(50, 3, 20), prompts(50, 3, 20)
    assert first == again and len({tuple(p) for p in first}) == 3
    assert prompts(50, 1, 20)[0] == first[0] and all(0 <= t < 50 for p in first for t in p)
