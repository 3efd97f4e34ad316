from __future__ import annotations

from dataclasses import replace

import pytest

from gossamer.backends.base import MemoryReport, ReceiptLine
from gossamer.bench.ablation.arms import ORDER, base
from gossamer.bench.ablation.mix import Measured
from gossamer.bench.ablation.proof import Evidence, prove
from gossamer.bench.ablation.worker import State
from gossamer.config import LayerFusion

MEMORY = MemoryReport(
    weights=100, kv=50, kv_tokens=64, arena=40, arena_separate=90, arena_shared=40, workspace=8
)
RUN = Measured(
    tokens_per_s=10.0, ttft_ms=5.0, itl_ms=1.0, tokens=((1, 2), (3,)), running_mean=2.0, running_most=4,
    steps=9, computed=40, held=0.5, preemptions=0, drafted=0, accepted=0, cpu=0.9, seconds=1.0,
    mix_seconds=1.0, forced=False,
)  # fmt: skip


def line(kernel: str, calls: int, rows: int = 0) -> ReceiptLine:
    return ReceiptLine(
        node="n",
        kernel=kernel,
        isa="avx2",
        calls=calls,
        rows=rows,
        weight_bytes=10,
        seconds=0.1,
        share=0.5,
        gb_s=1.0,
    )


def state(*lines: ReceiptLine) -> State:
    return State(
        memory=MEMORY, resident=1000, isa="avx2", threads=1, units=0, pages=4, page_tokens=64, receipt=lines
    )


def evidence(kernel: str, calls: int = 3, rows: int = 5, **changes: object) -> Evidence:
    before, after = state(line(kernel, 1, 1)), state(line(kernel, 1 + calls, 1 + rows))
    fresh = {
        key: changes.pop(key)
        for key in list(changes)
        if key in ("drafted", "steps", "running_mean", "running_most")
    }
    config = changes.pop("config", base("m"))
    runs = [replace(RUN, **fresh)]  # type: ignore[arg-type]
    return Evidence(config=config, before=before, after=replace(after, **changes), runs=runs)  # type: ignore[arg-type]


OFF = evidence("linear_f32")
SHOWN: dict[str, Evidence] = {
    "quantization": evidence("linear_int4"),
    "mixed_precision": evidence("linear_bf16"),
    "operator_fusion": evidence("gated_linear_f32"),
    "flash_attention": evidence("attention"),
    "layer_fusion": evidence("linear_f32", units=3, config=base("m", layer_fusion=LayerFusion())),
    "dynamic_shapes": evidence("linear_f32", rows=2),
    "paged_attention": evidence("linear_f32", pages=16, page_tokens=16),
    "memory_reuse": evidence("linear_f32", memory=replace(MEMORY, arena=10)),
    "continuous_batching": evidence("linear_f32", steps=5),
    "parallel_computing": evidence("linear_f32", threads=2),
    "hardware_kernels": evidence("linear_f32", isa="avx512"),
    "speculative_decoding": evidence("linear_f32", drafted=8),
}


def test_every_switch_has_a_case() -> None:
    assert set(ORDER) <= set(SHOWN)


@pytest.mark.parametrize("name", SHOWN)
def test_what_ran_is_proven_and_what_did_not_is_not(name: str) -> None:
    proof, missing = prove(name, OFF, SHOWN[name])
    assert not missing and proof.facts
    _, missing = prove(name, OFF, OFF)
    assert missing, f"{name} is proven by an engine that is its baseline"


def test_kernels_count_the_rounds_alone_and_lookups_read_no_weights() -> None:
    proof, _ = prove("quantization", OFF, SHOWN["quantization"])
    assert proof.kernels == (("linear_int4 (avx2)", 3, 30),)
    lookup = Evidence(
        config=base("m"),
        before=state(replace(line("embed_int4", 0), gb_s=None)),
        after=state(replace(line("embed_int4", 2), gb_s=None)),
        runs=(),
    )
    assert prove("quantization", OFF, lookup)[0].kernels == (("embed_int4 (avx2)", 2, 0),)


def test_tokens_are_compared_request_by_request() -> None:
    proof, _ = prove("memory_reuse", OFF, SHOWN["memory_reuse"])
    assert "the same tokens in all of 2 requests" in proof.facts
    other = replace(SHOWN["memory_reuse"], runs=[replace(RUN, tokens=((1, 2), (4,)))])
    assert "the same tokens in 1 of 2 requests" in prove("memory_reuse", OFF, other)[0].facts
