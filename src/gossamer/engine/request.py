"""What a user asks for and what comes back: sampling parameters, requests, outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from gossamer.errors import RequestError

__all__ = ["Completion", "FinishReason", "Request", "RequestOutput", "SamplingParams", "TokenLogprob"]

FinishReason = Literal["stop", "length", "abort", "error"]
MAX_LOGPROBS = 20
MAX_N = 128
MAX_STOPS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen; names and meanings follow vLLM.

    temperature 0 is greedy. top_k 0 or -1 means all. seed None draws a fresh one per request.
    max_tokens None runs to the end of the context. Raises RequestError for a value out of range.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        _check("n", self.n, 1, MAX_N)
        _check("temperature", self.temperature, 0, 100)
        _check("top_p", self.top_p, 0, 1, open_low=True)
        _check("top_k", self.top_k, -1, 2**31 - 1)
        _check("min_p", self.min_p, 0, 1)
        _check("presence_penalty", self.presence_penalty, -2, 2)
        _check("frequency_penalty", self.frequency_penalty, -2, 2)
        _check("repetition_penalty", self.repetition_penalty, 0, 100, open_low=True)
        if self.max_tokens is not None:
            _check("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _check("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}")
        if self.logprobs is not None:
            _check("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.seed is not None:
            _check("seed", self.seed, -(2**63), 2**64 - 1)
        if len(self.stop) > MAX_STOPS or any(not s for s in self.stop):
            raise RequestError(f"stop takes at most {MAX_STOPS} strings, none of them empty")
        if len(self.logit_bias) > 1024:
            raise RequestError(f"logit_bias has {len(self.logit_bias)} entries; at most 1024 are allowed")
        for token, bias in self.logit_bias.items():
            if token < 0 or not -100 <= bias <= 100:
                raise RequestError(f"logit_bias {token}: {bias} needs an id >= 0 and a bias in -100..100")


def _check(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RequestError(f"{name} {value!r} is not a finite number")
    if value < low or value > high or (open_low and value == low):
        raise RequestError(f"{name} {value} is outside {'(' if open_low else '['}{low}, {high}]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt for the engine. Tokens only: text is the business of the rooms around it.

    eos_ids end the output unless ignore_eos. priority: lower runs first. tenant salts shared state.
    """

    id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    eos_ids: tuple[int, ...] = ()
    priority: int = 0
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of a chosen token and of the `logprobs` largest, (id, logprob), largest first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class Completion:
    """One of a request's n outputs."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


@dataclass(slots=True)
class RequestOutput:
    """A request's outputs so far; finished once every one of them is.

    times: "arrival", "first_scheduled", "first_token", "finished" in seconds of time.perf_counter().
    """

    id: str
    prompt_ids: tuple[int, ...]
    outputs: list[Completion]
    prompt: str | None = None
    times: dict[str, float] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether no more tokens will come."""
        return all(c.finish_reason is not None for c in self.outputs)
