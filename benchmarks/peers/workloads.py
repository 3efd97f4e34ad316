"""The work: shapes of requests, and prompts that are the same for everyone."""

from __future__ import annotations

import random
from dataclasses import dataclass

__all__ = ["WORKLOADS", "Workload", "prompts"]


@dataclass(frozen=True, slots=True)
class Workload:
    """sequences at once, each of `prompt` tokens and `new` greedy ones; figure: which of a Timing's rates the
    table shows, "prefill" (prompt tokens per second) or "decode" (new tokens per second)."""

    name: str
    sequences: int
    prompt: int
    new: int
    figure: str


WORKLOADS = {
    w.name: w
    for w in (
        Workload("decode1", 1, 128, 64, "decode"),
        Workload("prefill512", 1, 512, 1, "prefill"),
        Workload("dec8", 8, 128, 64, "decode"),
        Workload("dec16", 16, 128, 64, "decode"),
        Workload("dec32", 32, 128, 64, "decode"),
    )
}


def prompts(vocab: int, sequences: int, length: int) -> list[list[int]]:
    """Token ids, different for every sequence."""
    rng = random.Random(f"{vocab} {length}")
    return [[rng.randrange(vocab) for _ in range(length)] for _ in range(sequences)]
