"""Prefilling a long prompt on the 8B shape, against the rate of torch's own matrix product."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from benchmarks.cuda.measure import Bench, Line, Work
from benchmarks.cuda.model import Model, needed_flops

__all__ = ["open_prefill", "prefill"]


def open_prefill(bench: Bench) -> tuple[Model, Work]:
    """A model that takes a prompt of 4096 tokens in one step, and what that must compute."""
    prompt = bench.some(4096, 24)
    model = Model(bench, "llama-3.1-8b", tokens=prompt, max_model_len=2 * prompt)
    model.prefill_seconds(prompt)  # compiles
    flops = needed_flops(model.graph, prompt, 1)
    work = Work(call=lambda: model.prefill_seconds(prompt), steps=1, flops=sum(flops.values()))
    return model, work


def prefill(bench: Bench) -> Iterator[Line]:
    """Operations that the prompt needs, over the time from the request to its first token."""
    model, work = open_prefill(bench)
    seconds = median(work.timed() for _ in range(bench.some(5, 1)))
    memory = model.memory_line()  # before limits are measured, which takes some
    prompt = bench.some(4096, 24)
    linear = needed_flops(model.graph, prompt, 1)["linear"]
    yield Line(
        case=f"prefill of {prompt} tokens, 8B, bf16",
        value=work.flops / seconds / 1e12,
        limit=bench.matmul / 1e12,
        unit="TFLOP/s",
        against="torch's bf16 product of 8192 x 8192 matrices",
        bar=0.60,
        note="linear layers (the head on one row) and causal attention, from request to token",
        detail={
            "ms": seconds * 1e3,
            "tokens_per_s": prompt / seconds,
            "share_of_linear_layers_alone": linear / seconds / bench.matmul,
        },
    )
    yield memory
