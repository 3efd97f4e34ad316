"""What a user asks for and what comes back: sampling parameters, requests, outputs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal

from gossamer.errors import RequestError

if TYPE_CHECKING:
    from gossamer.engine.structured_output import GrammarFactory

__all__ = [
    "Completion",
    "FinishReason",
    "Request",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputs",
    "TokenLogprob",
    "token_ids",
]

FinishReason = Literal["stop", "length", "abort", "error"]
MAX_LOGPROBS = 20
MAX_N = 128
MAX_STOPS = 64
MAX_STOP_LENGTH = 4096  # characters; while a text may begin one, it is held back
MAX_BIASES = 1024
MAX_GRAMMAR = 1 << 17  # characters of a schema, expression, grammar or all choices
MAX_SCHEMA_DEPTH = 64
MAX_CHOICES = 4096  # of a list of choices and of an enum
MAX_REPEATS = 10_000  # the n of {n} in a regular expression


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputs:
    """What an output must look like as a whole: exactly one of these; names and meanings follow vLLM.

    json: a JSON schema, as a mapping or text (kept as text). regex: a regular expression (Rust's syntax, no
    look-around and no references back). choice: texts, of which it is one. grammar: in Lark's syntax, as
    llguidance reads it, with the rule `start`. json_object: any JSON object. Raises RequestError.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    json_object: bool = False

    def __post_init__(self) -> None:
        named = ("json", "regex", "choice", "grammar")
        given = [name for name in named if getattr(self, name) is not None]
        given += ["json_object"] if self.json_object is not False else []
        if len(given) != 1 or not isinstance(self.json_object, bool):
            raise RequestError(
                f"structured_outputs has {', '.join(given) or 'nothing'}; give exactly one of json, regex, "
                "choice, grammar and json_object: true"
            )
        if self.json is not None:
            object.__setattr__(self, "json", _schema(self.json))
        elif self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))
        for name in ("json", "regex", "grammar"):
            text = getattr(self, name)
            if text is not None and not (isinstance(text, str) and 0 < len(text) <= MAX_GRAMMAR):
                what = f"{len(text)} characters" if isinstance(text, str) else _short(text)
                raise RequestError(
                    f"structured_outputs: {name} is {what}; give a text of 1 to {MAX_GRAMMAR} characters"
                )
        if self.regex is not None or self.grammar is not None:
            _check_repeats(self.regex or self.grammar or "")

    @property
    def kind(self) -> str:
        """Which of them it is, in words."""
        if self.json is not None:
            return "json schema"
        return next(name for name in ("regex", "choice", "grammar", "json_object") if getattr(self, name))


def _schema(value: str | Mapping[str, Any]) -> str:
    """A JSON schema as text."""
    try:
        schema = json.loads(value) if isinstance(value, str) and len(value) <= MAX_GRAMMAR else value
        if isinstance(schema, str) or not isinstance(schema, Mapping):
            found = f"{len(schema)} characters" if isinstance(schema, str) else _short(schema)
            raise RequestError(
                f"structured_outputs: json is {found}; give an object of at most {MAX_GRAMMAR} characters"
            )
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
        text.encode()
        for key, each in _walk(schema):
            if key == "pattern" and isinstance(each, str):
                _check_repeats(each)
            elif key == "patternProperties" and isinstance(each, Mapping):
                for pattern in each:
                    _check_repeats(pattern)
            elif key == "enum" and isinstance(each, list) and len(each) > MAX_CHOICES:
                raise RequestError(
                    f"structured_outputs: an enum has {len(each)} values; at most {MAX_CHOICES} are allowed"
                )
    except (TypeError, ValueError, RecursionError) as cause:
        raise RequestError(f"structured_outputs: json is not a JSON schema ({str(cause)[:200]})") from None
    return text


def _walk(schema: Any) -> Iterator[tuple[str | None, Any]]:
    """(key, value) of everything in a schema. Raises RequestError where it nests too deep."""
    waiting: list[tuple[str | None, Any, int]] = [(None, schema, 0)]
    while waiting:
        key, value, depth = waiting.pop()
        if depth > MAX_SCHEMA_DEPTH:
            raise RequestError(
                f"structured_outputs: json nests deeper than the {MAX_SCHEMA_DEPTH} levels allowed; use $ref"
            )
        yield key, value
        if isinstance(value, Mapping):
            waiting += [(name, each, depth + 1) for name, each in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [(None, each, depth + 1) for each in value]


def _check_repeats(pattern: str) -> None:
    found = re.findall(r"\{\s*(\d+)\s*(?:,\s*(\d*)\s*)?\}", pattern)
    for digits in (each for pair in found for each in pair if each):
        if len(digits) > 9 or int(digits) > MAX_REPEATS:
            raise RequestError(
                f"structured_outputs: a repetition of {digits[:20]} is asked for; at most {MAX_REPEATS} is "
                "allowed"
            )


def _choices(value: Iterable[str]) -> tuple[str, ...]:
    listed = (
        None if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable) else tuple(value)
    )
    good = listed is not None and 0 < len(listed) <= MAX_CHOICES and all(type(t) is str for t in listed)
    if not good or listed is None or not 0 < sum(map(len, listed)) <= MAX_GRAMMAR or not all(listed):
        raise RequestError(
            f"structured_outputs: choice {_short(value)} is not a list of 1 to {MAX_CHOICES} texts, none "
            f"empty, of {MAX_GRAMMAR} characters together"
        )
    return tuple(dict.fromkeys(listed))


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen; names and meanings follow vLLM.

    temperature 0 is greedy. top_k 0 or -1 means all. seed None draws a fresh one per request.
    max_tokens None runs to the end of the context. prompt_logprobs: log-probabilities of the prompt's tokens
    too, with so many of the likeliest. structured_outputs: what the output must look like (a mapping of its
    fields will do); once nothing can follow, the output ends with "stop", whatever min_tokens says. Raises
    RequestError for a value out of range.
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
    prompt_logprobs: int | None = None
    structured_outputs: StructuredOutputs | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        for name, (low, high, open_low) in _NUMBERS.items():
            self._set(name, _number(name, getattr(self, name), low, high, open_low=open_low))
        for name, (least, most, optional) in _WHOLE.items():
            value = getattr(self, name)
            if not (optional and value is None):
                self._set(name, _whole(name, value, least, most))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}")
        self._set("stop", _stops(self.stop))
        self._set("stop_token_ids", token_ids("stop_token_ids", self.stop_token_ids or ()))
        self._set("logit_bias", _biases(self.logit_bias))
        wanted = self.structured_outputs
        if isinstance(wanted, Mapping):
            try:
                self._set("structured_outputs", StructuredOutputs(**wanted))
            except TypeError:
                known = ", ".join(each.name for each in fields(StructuredOutputs))
                raise RequestError(
                    f"structured_outputs {_short(wanted)} has an unknown key; known: {known}"
                ) from None
        elif wanted is not None and not isinstance(wanted, StructuredOutputs):
            raise RequestError(f"structured_outputs {_short(wanted)} is not a StructuredOutputs")

    @property
    def penalises(self) -> bool:
        """Whether tokens that were there before are treated otherwise than new ones."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


# name -> (lowest, highest, lowest itself is excluded)
_NUMBERS: Mapping[str, tuple[float, float, bool]] = {
    "temperature": (0, 100, False),
    "top_p": (0, 1, True),
    "min_p": (0, 1, False),
    "presence_penalty": (-2, 2, False),
    "frequency_penalty": (-2, 2, False),
    "repetition_penalty": (0.01, 100, False),  # logits over less are no numbers in float32
}
# name -> (lowest, highest, may be None)
_WHOLE: Mapping[str, tuple[int, int, bool]] = {
    "n": (1, MAX_N, False),
    "top_k": (-1, 2**31 - 1, False),
    "max_tokens": (1, 2**31 - 1, True),
    "min_tokens": (0, 2**31 - 1, False),
    "logprobs": (0, MAX_LOGPROBS, True),
    "prompt_logprobs": (0, MAX_LOGPROBS, True),
    "seed": (-(2**63), 2**64 - 1, True),
}


def token_ids(name: str, value: Iterable[int]) -> tuple[int, ...]:
    """A tuple of whole numbers (numpy's too). Raises RequestError, which begins with the name."""
    ids = (
        None if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable) else tuple(value)
    )
    if ids is None or not all(type(token) is int or _is(Integral, token) for token in ids):
        raise RequestError(f"{name} {_short(value)} is not a list of token ids; give whole numbers")
    return tuple(map(int, ids))


def _number(name: str, value: float, low: float, high: float, *, open_low: bool) -> float:
    if not _is(Real, value) or value != value:
        raise RequestError(f"{name} {_short(value)} is not a finite number")
    if value < low or value > high or (open_low and value == low):
        raise RequestError(f"{name} {_short(value)} is outside {'(' if open_low else '['}{low}, {high}]")
    return float(value)


def _whole(name: str, value: int, low: int, high: int) -> int:
    if not _is(Integral, value):
        raise RequestError(f"{name} {_short(value)} is not a whole number")
    if not low <= value <= high:
        raise RequestError(f"{name} {_short(value)} is outside [{low}, {high}]")
    return int(value)


def _stops(value: str | Iterable[str] | None) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        value = () if value is None else (value,)
    stops = tuple(value)
    if len(stops) > MAX_STOPS or not all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_LENGTH for s in stops):
        raise RequestError(
            f"stop {_short(stops)} is not a string or a list of at most {MAX_STOPS}, each of 1 to "
            f"{MAX_STOP_LENGTH} characters"
        )
    return stops


def _biases(value: Mapping[int, float] | None) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise RequestError(f"logit_bias {_short(value)} is not a mapping from token ids to biases")
    if len(value) > MAX_BIASES:
        raise RequestError(f"logit_bias has {len(value)} entries; at most {MAX_BIASES} are allowed")
    for token, bias in value.items():
        if not (_is(Integral, token) and token >= 0 and _is(Real, bias) and -100 <= bias <= 100):
            raise RequestError(
                f"logit_bias {_short(token)}: {_short(bias)} needs an id >= 0 and a bias in -100..100"
            )
    return {int(token): float(bias) for token, bias in value.items()}


def _is(kind: type, value: object) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _short(value: object) -> str:
    """For a message: of a value that may be of any size, the beginning."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"of {value.bit_length()} bits"
    text = repr(value[:64] if isinstance(value, str | bytes | list | tuple) else value)
    return text if len(text) <= 80 else text[:77] + "..."


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt for the engine. Tokens only: text is the business of the rooms around it.

    eos_ids end the output unless ignore_eos. priority: lower runs first. tenant: whose it is; tenants share
    the machine evenly. cache_salt: requests of other salts share no keys and values with it. grammar: makes
    what restrains each output. Raises RequestError for a priority beyond 32 bits or a salt that is no text.
    """

    id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    eos_ids: tuple[int, ...] = ()
    priority: int = 0
    tenant: str = ""
    cache_salt: str = ""
    grammar: GrammarFactory | None = None

    def __post_init__(self) -> None:
        _whole("priority", self.priority, -(2**31), 2**31 - 1)
        try:
            self.cache_salt.encode()
        except (AttributeError, UnicodeEncodeError):
            raise RequestError(f"cache_salt {_short(self.cache_salt)} is not text") from None


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
    prompt_logprobs: where asked for, one per token of the prompt, None for the first. num_cached_tokens: of
    the prompt, found in the prefix cache.
    """

    id: str
    prompt_ids: tuple[int, ...]
    outputs: list[Completion]
    prompt: str | None = None
    times: dict[str, float] = field(default_factory=dict)
    prompt_logprobs: list[TokenLogprob | None] | None = None
    num_cached_tokens: int = 0

    @property
    def finished(self) -> bool:
        """Whether no more tokens will come."""
        return all(c.finish_reason is not None for c in self.outputs)
