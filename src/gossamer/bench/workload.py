"""Work for an engine: prompts of random tokens with lengths drawn at random or given."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gossamer.config import EngineConfig
from gossamer.errors import ConfigError

__all__ = ["Job", "Lengths", "arrivals", "cut_lengths", "make_jobs", "random_lengths", "uncached"]

Lengths = list[tuple[int, int]]
"""(prompt tokens, output tokens) of each request."""


@dataclass(frozen=True, slots=True)
class Job:
    """One request: its prompt, how many tokens it produces, when it comes (seconds from the start)."""

    prompt: tuple[int, ...]
    output_len: int
    at: float = 0.0


def random_lengths(count: int, input_len: int, output_len: int, spread: float, seed: int) -> Lengths:
    """Lengths uniform in mean * (1 - spread) to mean * (1 + spread), at least 1."""
    for name, value in (("num_prompts", count), ("input_len", input_len), ("output_len", output_len)):
        if value < 1:
            raise ConfigError(f"{name} {value} must be at least 1")
    if not 0 <= spread < 1:
        raise ConfigError(f"random_range_ratio {spread} is not in [0, 1)")
    rng = random.Random(seed)

    def draw(mean: int) -> int:
        return max(1, rng.randint(math.floor(mean * (1 - spread)), math.ceil(mean * (1 + spread))))

    return [(draw(input_len), draw(output_len)) for _ in range(count)]


def cut_lengths(lengths: Lengths, longest: int) -> tuple[Lengths, int]:
    """Lengths that fit into `longest` tokens (prompt first, then output), and how many had to be cut."""
    fitting = []
    for prompt, output in lengths:
        prompt = min(prompt, longest - 1)
        fitting.append((prompt, min(output, longest - prompt)))
    return fitting, sum(a != b for a, b in zip(lengths, fitting, strict=True))


def arrivals(count: int, rate: float, seed: int) -> list[float]:
    """Times of a Poisson process of `rate` requests a second; all at once for an infinite rate."""
    if not rate > 0:
        raise ConfigError(f"request rate {rate} must be more than 0 (inf is all at once)")
    if math.isinf(rate):
        return [0.0] * count
    rng, now, times = random.Random(seed), 0.0, []
    for _ in range(count):
        now += rng.expovariate(rate)
        times.append(now)
    return times


def make_jobs(lengths: Lengths, times: Sequence[float], vocab: int, seed: int) -> list[Job]:
    """Jobs with prompts of random token ids."""
    rng = random.Random(seed)
    return [
        Job(tuple(rng.randrange(vocab) for _ in range(prompt)), output, at)
        for (prompt, output), at in zip(lengths, times, strict=True)
    ]


def uncached(config: EngineConfig) -> EngineConfig:
    """The configuration without a prefix cache: for work that is repeated to be measured."""
    return replace(config, prefix_cache=None)
