"""Decoding one sequence of the 8B shape, and the gap between its steps on the 1B shape."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from benchmarks.cuda.measure import Bench, Line, Work
from benchmarks.cuda.model import Model, decode_bytes, kv_token_bytes
from benchmarks.cuda.trace import busy, device_events, largest_gaps, span, traced

__all__ = ["decode", "gap", "open_decode"]

_BARS = {"bf16": 0.85, "int4": 0.65, "fp8": 0.75}
_CALLS = 3


def open_decode(bench: Bench, shape: str, format: str) -> tuple[Model, Work]:
    """A model that decodes a sequence behind 128 tokens, and what a step of it must move. format: of the
    weights."""
    prompt, warm, steps = bench.some(128, 8), bench.some(32, 2), bench.some(128, 2)
    model = Model(
        bench,
        shape,
        tokens=bench.some(512, 16),
        max_model_len=bench.some(1024, 64),
        quantization=None if format == "bf16" else format,
    )
    touched = decode_bytes(model.graph, kv_token_bytes(model), [prompt + warm + _CALLS * steps // 2])
    call = model.decoding(prompt, warm, steps, calls=_CALLS + 1)
    return model, Work(call=call, steps=steps, bytes=touched)


def decode(bench: Bench, format: str) -> Iterator[Line]:
    """Bytes that a step must touch, over the time between two tokens."""
    model, work = open_decode(bench, "llama-3.1-8b", format)
    step = median(work.timed() / work.steps for _ in range(bench.some(_CALLS, 1)))
    memory = model.memory_line()  # before limits are measured, which takes some
    yield Line(
        case=f"decode, one sequence, 8B, {format}",
        value=work.bytes / step / 1e9,
        limit=bench.bandwidth / 1e9,
        unit="GB/s",
        against="a copy on the device",
        bar=_BARS[format],
        note="weights and KV that a step must read, over the time between tokens, engine included",
        detail={"step_ms": step * 1e3, "bytes": work.bytes, "tokens_per_s": 1 / step},
    )
    yield memory


def gap(bench: Bench) -> Iterator[Line]:
    """What of a step the device waits for the next one: the longest gaps in a trace of steps, as many as
    there are between steps."""
    model, work = open_decode(bench, "llama-3.2-1b", "bf16")
    step = work.timed() / work.steps
    memory = model.memory_line()  # before the profiler takes some
    events = device_events(traced(work.call, bench.at), bench.at)
    whole = span(events)
    between = sum(largest_gaps(events, work.steps - 1))
    yield Line(
        case="gap between steps, one sequence, 1B, bf16",
        value=between / work.steps,
        limit=whole / work.steps,
        unit="us",
        against="the step",
        bar=0.05,
        wanted="at most",
        note="from the profiler's times, which slows what starts kernels: without it gaps are no longer",
        detail={
            "step_us_without_profiler": step * 1e6,
            "busy_us": busy(events) / work.steps,
            "idle_share_of_trace": 1 - busy(events) / whole,
            "idle_share_by_clock": 1 - busy(events) / work.steps / (step * 1e6),
            "device_calls_per_step": len(events) / work.steps,
        },
    )
    yield memory
