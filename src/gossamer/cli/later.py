"""Verbs and flags that the plan of the house has and this version has not: asked for, they say so."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["not_built"]

_LATER = {
    "--tensor-parallel-size": "tensor parallelism; --threads uses the cores of this machine",
    "--tp": "tensor parallelism; --threads uses the cores of this machine",
    "--pipeline-parallel-size": "pipeline parallelism",
    "--speculative-config": "speculative decoding",
    "--enable-prefix-caching": "the prefix cache",
    "--itl-goal-ms": "dynamic batching",
    "--device": "other devices than the CPU",
    "plan": "the planner; `gossamer probe` and `gossamer graph --costs` show what it will stand on",
    "ablate": "the ledger of techniques; `gossamer bench` measures configurations one by one",
    "techniques": "the list of techniques; ARCHITECTURE.md has the map",
    "compress": "offline compression; --quantization quantizes at load",
    "eval": "the measurement of quality",
    "export": "export to other formats",
}


def not_built(arguments: Sequence[str], message: str) -> str | None:
    """What to say of a command line that was refused with `message`; None where it is plainly wrong."""
    for argument in arguments:
        name = argument.split("=", 1)[0]
        if name in _LATER and name in message:
            return f"{name} is not built yet: {_LATER[name]}"
    return None
