"""Traces: when requests came and how long they were, from CSV files as clouds and simulators publish them.

Times are replayed as they stand, or compressed: by a factor, to a mean rate, or wholly (all are there from
the start). Compression keeps the pattern of arrivals, bursts included.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from gossamer.bench.workload import Job, arrivals, make_jobs
from gossamer.errors import ConfigError

__all__ = ["Arrival", "Pace", "fit", "pace_jobs", "read_trace", "schedule"]

_NAMES = {  # without case, spaces and underscores
    "time": {"timestamp", "time", "arrival", "arrivaltime", "arrivedat", "at", "t", "starttime"},
    "input": {
        "contexttokens", "inputtokens", "prompttokens", "requesttokens", "numprefilltokens", "inputlen",
        "inputlength", "promptlen", "promptlength", "prefilltokens",
    },
    "output": {
        "generatedtokens", "outputtokens", "completiontokens", "responsetokens", "numdecodetokens",
        "outputlen", "outputlength", "completionlen", "responselength", "decodetokens",
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a trace: its tokens, and when it came (seconds from the first; None: not recorded)."""

    input_len: int
    output_len: int
    at: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How a trace's times become a replay's; at most one of speed, rate and saturate.

    speed: times are divided by it. rate: mean requests a second. saturate: all are there from the start.
    duration: only what comes within so many seconds of the replay. seed: of Poisson arrivals, for a trace
    that has no times. Raises ConfigError for contradictions.
    """

    speed: float | None = None
    rate: float | None = None
    saturate: bool = False
    duration: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("speed", "rate", "duration"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"{name} {value} must be a number above 0")
        if (self.speed is not None) + (self.rate is not None) + self.saturate > 1:
            raise ConfigError("--speed, --rate and --saturate each say when requests come; give one of them")
        if self.saturate and self.duration is not None:
            raise ConfigError(
                "with --saturate all requests come at once, so --duration cuts nothing; give --num-requests"
            )


def read_trace(path: Path, columns: Sequence[str] | None = None) -> list[Arrival]:
    """Every request of a CSV file with a header, in the order of arrival.

    columns: the names of (time, input, output) or (input, output); None: known ones are looked for, such as
    Azure's TIMESTAMP, ContextTokens, GeneratedTokens or Vidur's num_prefill_tokens, num_decode_tokens. Times
    are seconds or ISO 8601 timestamps. Raises ConfigError for anything else.
    """
    line = 1
    found: list[tuple[float | None, int, int]] = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            time, prompt, output = _columns(path, list(reader.fieldnames or ()), columns)
            for row in reader:
                line = reader.line_num
                at = None if time is None else _seconds(row[time])
                found.append((at, _length(row[prompt]), _length(row[output])))
    except OSError as error:
        raise ConfigError(f"cannot read the trace {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"the trace {path} is not UTF-8 text") from None
    except csv.Error as error:
        raise ConfigError(f"the trace {path} is no CSV file: {error}") from None
    except ValueError as error:
        raise ConfigError(f"trace {path} line {line}: {error}") from None
    if not found:
        raise ConfigError(f"trace {path} has no requests")
    if found[0][0] is None:
        return [Arrival(prompt, output, None) for _, prompt, output in found]
    found.sort(key=lambda each: each[0] or 0.0)
    first = found[0][0]
    return [Arrival(prompt, output, (at or 0.0) - first) for at, prompt, output in found]


def _columns(path: Path, there: list[str], given: Sequence[str] | None) -> tuple[str | None, str, str]:
    if given is not None:
        missing = [name for name in given if name not in there]
        if missing or len(given) not in (2, 3):
            what = (
                f"trace {path} has no column {missing[0]!r}"
                if missing
                else f"{len(given)} columns were named"
            )
            raise ConfigError(
                f"{what}; --columns takes TIME,INPUT,OUTPUT or INPUT,OUTPUT of {', '.join(there) or 'none'}"
            )
        return (None, given[0], given[1]) if len(given) == 2 else (given[0], given[1], given[2])
    plain = {name: "".join(c for c in name.lower() if c.isalnum()) for name in there}
    time, prompt, output = (
        next((name for name in there if plain[name] in known), None) for known in _NAMES.values()
    )
    if prompt is None or output is None:
        raise ConfigError(
            f"trace {path} needs columns such as TIMESTAMP, ContextTokens, GeneratedTokens, or "
            f"num_prefill_tokens and num_decode_tokens; it has {', '.join(there) or 'none'}: name "
            "them with --columns"
        )
    return time, prompt, output


def _seconds(text: str | None) -> float:
    try:
        at = float(text or "")
    except ValueError:
        try:
            moment = datetime.fromisoformat((text or "").strip())
        except ValueError:
            raise ValueError(
                f"time {text!r} is neither a number of seconds nor such as 2023-11-16 18:15:46.68"
            ) from None
        at = (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp()
    if not math.isfinite(at):
        raise ValueError(f"time {text!r} is not finite")
    return at


def _length(text: str | None) -> int:
    try:
        number = float(text or "")
        if not number.is_integer():
            raise ValueError
    except (ValueError, OverflowError):
        raise ValueError(f"length {text!r} is not a whole number of tokens") from None
    if number < 1:
        raise ValueError("lengths must be at least 1")
    return int(number)


def fit(trace: Sequence[Arrival], longest: int, *, skip: bool) -> tuple[list[Arrival], int]:
    """Requests that fit into `longest` tokens (2 at least), and how many were longer: those are skipped, or
    cut, the prompt first and then the output."""
    long = sum(a.input_len + a.output_len > longest for a in trace)
    if skip:
        return [a for a in trace if a.input_len + a.output_len <= longest], long
    fitting = []
    for a in trace:
        prompt = min(a.input_len, longest - 1)
        fitting.append(replace(a, input_len=prompt, output_len=min(a.output_len, longest - prompt)))
    return fitting, long


def schedule(trace: Sequence[Arrival], pace: Pace) -> list[float]:
    """When the requests come, in seconds of the replay, ascending; shorter than the trace where
    pace.duration ends it. Raises ConfigError for a trace without times that is to keep them."""
    if pace.saturate:
        return [0.0] * len(trace)
    known = [a.at for a in trace if a.at is not None]
    if len(known) < len(trace):
        if pace.rate is None:
            raise ConfigError("this trace has no times; give --rate (random arrivals) or --saturate")
        times = arrivals(len(trace), pace.rate, pace.seed)
    else:
        times = [at - known[0] for at in known]
        factor = 1.0 if pace.speed is None else 1 / pace.speed
        if pace.rate is not None and len(times) > 1:
            if not times[-1]:
                raise ConfigError(
                    "all requests of this trace come at once, which has no --rate; leave it out"
                )
            factor = (len(times) - 1) / pace.rate / times[-1]
        times = [at * factor for at in times]
    return times if pace.duration is None else [at for at in times if at <= pace.duration]


def pace_jobs(trace: Sequence[Arrival], pace: Pace, vocab: int) -> list[Job]:
    """Jobs of a trace, with prompts of random token ids."""
    times = schedule(trace, pace)
    lengths = [(a.input_len, a.output_len) for a in trace[: len(times)]]
    return make_jobs(lengths, times, vocab, pace.seed)
