"""What a plan is to be best at, and what it must hold."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from gossamer.errors import ConfigError
from gossamer.planner.workload import Workload

__all__ = ["OBJECTIVES", "Goal", "Limits", "Objective", "QualityLimit"]

Objective = Literal["memory", "latency", "throughput", "easy", "production", "production-latency"]

OBJECTIVES: dict[Objective, str] = {
    "memory": "the fewest bytes in all",
    "latency": "the shortest time for one request",
    "throughput": "the most output tokens a second",
    "easy": "a sensible default that keeps the model as it is stored",
    "production": "the most output tokens a second within a limit on the time between tokens",
    "production-latency": "the shortest time between tokens with several requests running",
}
"""Each objective in words."""

_CONCURRENCY: dict[Objective, int] = {
    "memory": 1, "latency": 1, "throughput": 64, "easy": 8, "production": 32, "production-latency": 8,
}  # fmt: skip
_PRODUCTION_ITL_MS = 100.0  # ten tokens a second: people read no faster


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityLimit:
    """Most that may be lost against the original: kl in nats per token, or ratio, a perplexity by the
    original's; exactly one is given."""

    kl: float | None = None
    ratio: float | None = None

    @classmethod
    def parse(cls, text: str) -> QualityLimit:
        """From "0.02" (nats per token) or "2%" (perplexity above the original's).

        Raises ConfigError for anything else.
        """
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*(%?)\s*", text)
        if match is None or len(text) > 30:
            raise ConfigError(
                f"quality limit {text!r} is not understood; write 0.02 for a KL divergence of at most 0.02 "
                "nats per token, or 2% for a perplexity of at most 2 % above the original's"
            )
        value = float(match[1])
        return cls(ratio=1.0 + value / 100.0) if match[2] else cls(kl=value)

    def __str__(self) -> str:
        if self.ratio is not None:
            return f"a perplexity of at most {self.ratio:.4g} times the original's"
        return f"a KL divergence of at most {self.kl:g} nats per token"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What no choice may break. memory: bytes of the whole process; itl_ms, ttft_ms: milliseconds."""

    memory: int
    itl_ms: float | None = None
    ttft_ms: float | None = None
    quality: QualityLimit | None = None

    def __post_init__(self) -> None:
        for flag, value in (("--itl-limit-ms", self.itl_ms), ("--ttft-limit-ms", self.ttft_ms)):
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{flag} {value:g} must be a number of milliseconds above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """An objective for a workload within limits. fixed_concurrency: whether the workload's concurrency was
    asked for, so that no plan may run fewer at once; fixed_lengths: the same of its lengths. soft_itl_ms: a
    limit that nobody asked for and that gives way where nothing holds it."""

    objective: Objective
    limits: Limits
    work: Workload = field(default_factory=Workload)
    fixed_concurrency: bool = False
    fixed_lengths: bool = False

    @property
    def soft_itl_ms(self) -> float | None:
        """Milliseconds between tokens that `production` holds where no limit is given."""
        wanted = self.objective == "production" and self.limits.itl_ms is None
        return _PRODUCTION_ITL_MS if wanted else None

    @classmethod
    def of(
        cls,
        objective: str,
        limits: Limits,
        *,
        input_len: int | None = None,
        output_len: int | None = None,
        concurrency: int | None = None,
        most: int | None = None,
    ) -> Goal:
        """From what people type; None takes the objective's own. most: tokens of the longest sequence, which
        lengths that were not given are cut to.

        Raises ConfigError for an objective that is unknown and a workload that cannot be.
        """
        if objective not in get_args(Objective):
            raise ConfigError(f"objective {objective!r} is unknown; choose {', '.join(get_args(Objective))}")
        usual = Workload()
        work = Workload(
            prompt_tokens=usual.prompt_tokens if input_len is None else input_len,
            output_tokens=usual.output_tokens if output_len is None else output_len,
            concurrency=_CONCURRENCY[objective] if concurrency is None else concurrency,  # type: ignore[index]
        )
        if most is not None and work.longest > most:
            if input_len is None:
                work = replace(work, prompt_tokens=max(1, min(work.prompt_tokens, most - work.output_tokens)))
            if output_len is None:
                work = replace(work, output_tokens=max(1, min(work.output_tokens, most - work.prompt_tokens)))
            if work.longest > most:
                raise ConfigError(
                    f"requests of {work.prompt_tokens} and {work.output_tokens} tokens make sequences of "
                    f"{work.longest}, and {most} is the longest there may be; lower --input-len or "
                    "--output-len"
                )
        return cls(
            objective=objective,  # type: ignore[arg-type]
            limits=limits,
            work=work,
            fixed_concurrency=concurrency is not None,
            fixed_lengths=input_len is not None or output_len is not None,
        )
