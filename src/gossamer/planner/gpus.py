"""GPUs of this machine by name, as the kernel lists them; no driver library is loaded."""

from __future__ import annotations

from pathlib import Path

__all__ = ["gpus"]

_NVIDIA = Path("/proc/driver/nvidia/gpus")
_AMD = Path("/sys/class/kfd/kfd/topology/nodes")


def gpus() -> tuple[str, ...]:
    """Names of NVIDIA and AMD GPUs. A plan for the processor says that they are there."""
    return (*_nvidia(), *_amd())


def _nvidia() -> list[str]:
    found = []
    for file in sorted(_NVIDIA.glob("*/information")):
        try:
            lines = dict(line.split(":", 1) for line in file.read_text().splitlines() if ":" in line)
        except OSError:
            continue
        found.append(lines.get("Model", "an NVIDIA GPU").strip())
    return found


def _amd() -> list[str]:
    found = []
    for node in sorted(_AMD.glob("*")):
        try:
            facts = dict(
                line.split(" ", 1) for line in (node / "properties").read_text().splitlines() if " " in line
            )
            if int(facts.get("simd_count", "0")) > 0:
                found.append(f"AMD {(node / 'name').read_text().strip() or 'GPU'}")
        except (OSError, ValueError):
            continue
    return found
