"""Certificates to write and read."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from gossamer.quality.certificate import Certificate, StepRecord, data_record, recipe_record
from gossamer.quality.report import (
    Beside,
    Comparison,
    Divergence,
    Execution,
    Noise,
    Quality,
    TaskScore,
    TextScore,
)
from gossamer.quality.sizes import ModelRecord

SCORE = TextScore(
    name="a.txt", tokens=10, bytes=40, loss=2.5, error=0.25, perplexity=12.182, bits_per_byte=0.9017
)
DIVERGENCE = Divergence(tokens=10, kl_mean=2e-3, kl_error=1e-4, kl_p95=6e-3, kl_p99=9e-3, top1=0.9)
RUN = Execution(
    model="owner/name", backend="cpu", isa="avx2", formats={"int8": 1.0}, kv="bf16", kernels=("linear_int8",)
)
BEFORE = ModelRecord(
    name="owner/name",
    architecture="llama",
    sha256="ab" * 32,
    bytes=2_000_000,
    parameters=1_000_000,
    bits_per_weight=16.0,
    sparsity=0.0,
)
QUALITY = Quality(
    execution=RUN,
    context=512,
    stride=384,
    bos=False,
    text_sha256="cd" * 32,
    texts=(SCORE,),
    total=SCORE,
    reference=Comparison(
        execution=replace(RUN, formats={"f32": 1.0}, kv="f32"),
        score=SCORE,
        ratio=1.01,
        ratio_error=0.001,
        divergence=DIVERGENCE,
        noise=Noise(execution=RUN, divergence=replace(DIVERGENCE, kl_mean=1e-9)),
    ),
    beside=Beside(execution=RUN, perplexity=12.1, served=12.2, divergence=DIVERGENCE),
    tasks=(
        TaskScore(
            name="q.jsonl",
            kind="multiple choice",
            count=4,
            accuracy=0.5,
            normalised=0.75,
            chance=0.25,
            error=0.25,
        ),
    ),
    seconds=1.5,
)


def certificate() -> Certificate:
    """One with everything in it."""
    return Certificate(
        original=BEFORE,
        compressed=replace(BEFORE, name="small", bytes=1_000_000, bits_per_weight=8.0),
        recipe=recipe_record("int8", "[[step]]\nquantize = 'rtn'\n", {"step": [{"quantize": "rtn"}]}),
        data=data_record([], np.arange(7, dtype=np.int32)),
        seed=3,
        steps=(
            StepRecord(step="quantize rtn", config={"format": "int8"}, seconds=2.0, facts={"layers": [0.5]}),
        ),
        quality=QUALITY,
    )
