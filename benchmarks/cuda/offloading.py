"""Decoding a model larger than the device's share of memory, its weights streamed from the host."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.cuda.measure import Bench, Line, Work
from benchmarks.cuda.model import Model
from gossamer.config import Offloading

__all__ = ["offloading", "open_offloading"]

_BUDGET = 24_000_000_000
_TINY_BUDGET = 40_000


def open_offloading(bench: Bench) -> tuple[Model, Work]:
    """The 70B shape in int4 within 24 GB of device memory. Work.bytes are those that a step streams."""
    prompt, warm, steps = bench.some(64, 4), bench.some(2, 1), bench.some(4, 1)
    model = Model(
        bench,
        "llama-3.1-70b",
        tokens=bench.some(128, 16),
        max_model_len=bench.some(512, 64),
        quantization="int4",
        offloading=Offloading(device_bytes=_TINY_BUDGET) if bench.tiny else Offloading(),
        memory_budget=None if bench.tiny else _BUDGET,
    )
    call = model.decoding(prompt, warm, steps, calls=3)
    return model, Work(call=call, steps=steps, bytes=model.started.memory.host)


def offloading(bench: Bench) -> Iterator[Line]:
    """Bytes that a step streams, over its time, against the link between host and device."""
    model, work = open_offloading(bench)
    step = work.timed() / work.steps
    memory = model.memory_line()
    yield Line(
        case="decode, one sequence, 70B, int4, 24 GB of device memory",
        value=work.bytes / step / 1e9,
        limit=bench.link / 1e9,
        unit="GB/s",
        against="a copy from pinned host memory",
        bar=0.80,
        note="bytes of the weights that lie on the host, each brought once a step",
        detail={"step_s": step, "bytes": work.bytes},
    )
    yield memory
    yield Line(
        case="resident memory, 70B, of 24 GB",
        value=memory.value,
        limit=_BUDGET / 1e9,
        unit="GB",
        against="the budget given",
        bar=1.0,
        wanted="at most",
    )
