"""The rows of the GPU benchmark run: the same code on tiny shapes, in Triton's interpreter where there is no
GPU. What they measure here is nothing; that they get through, and what they tell, is what is tested."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # to be known before Triton is imported
pytest.importorskip("triton", reason="the cuda backend needs Triton (pip install 'gossamer[cuda]')")

from benchmarks.cuda.child import measure
from benchmarks.cuda.measure import Bench
from benchmarks.cuda.model import decode_bytes, needed_flops
from benchmarks.cuda.profile import profiled
from benchmarks.cuda.rows import ROWS
from benchmarks.cuda.serving import conversations
from benchmarks.cuda.shapes import shape_of, write_shape
from gossamer.backends.cuda.device import open_device
from gossamer.config import EngineConfig, MixedPrecision, Quantization
from gossamer.graph.ir import Graph
from gossamer.runtime.planning import passed
from gossamer.runtime.start import load_planned_graph

SLOW = pytest.mark.slow


def told(row: str, before: dict[str, Any] | None = None) -> list[Mapping[str, Any]]:
    """All that a row tells."""
    found: list[Mapping[str, Any]] = []
    measure(row, tiny=True, before=before or {}, tell=found.append)
    return found


def graph_of(shape: str, directory: Path, quantization: str | None = None) -> Graph:
    """The graph of a shape as it is served."""
    config = EngineConfig(
        model=str(write_shape(shape, directory)),
        load_format="dummy",
        quantization=None if quantization is None else Quantization.parse(quantization),
        mixed_precision=MixedPrecision(dtype="bf16") if quantization is None else None,
    )
    graph, *_ = load_planned_graph(config)
    return passed(graph, config)[0]


@pytest.mark.parametrize(
    ("row", "bars"),
    [
        ("attention-decode", [0.85, None]),
        ("attention-prefill", [0.75, None]),
        ("decode-bf16", [0.85, 1.0]),
        pytest.param("decode-int4", [0.65, 1.0], marks=SLOW),
        pytest.param("decode-fp8", [0.75, 1.0], marks=SLOW),
        ("gap", [0.05, 1.0]),
        ("prefill", [0.6, 1.0]),
        pytest.param("serving", [None, None, 1.0], marks=SLOW),
        pytest.param("offloading", [0.8, 1.0, 1.0], marks=SLOW),
    ],
)
def test_rows_run_and_are_held_to_the_bars(row: str, bars: list[float | None]) -> None:
    *lines, last = told(row)
    assert set(last) == {"seconds"}, last
    assert [each["line"]["bar"] for each in lines] == bars
    assert all(each["line"]["value"] >= 0 for each in lines)


def test_a_row_that_fails_says_why() -> None:
    (only,) = told("transformers-static")
    assert "run that first" in only["error"]


def test_peers_want_their_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.cuda.transformers_peer.version", lambda name: "4.57.6")
    case = "2 conversations at a quarter of their lengths, 8B, bf16"
    (only,) = told("transformers-batching", {"serving": {"lines": [{"case": case, "value": 1.0}]}})
    assert "transformers 5.17 and later, and 4.57.6 is installed" in only["error"]


def test_a_profile_names_what_ran(tmp_path: Path) -> None:
    bench = Bench(open_device(), tmp_path, tiny=True)
    work = ROWS["prefill"].work
    assert work is not None
    found = profiled(bench, work(bench))
    assert found["kernels"] and found["us_traced"] >= found["us_busy"] > 0
    assert found["us_at_matmul_rate"] > 0 == found["us_at_bandwidth"]


def test_rows_have_work_unless_others_do_it() -> None:
    assert [name for name, row in ROWS.items() if row.work is None] == [
        "transformers-batching",
        "transformers-static",
    ]


@pytest.mark.parametrize(
    ("shape", "quantization", "billions"),
    [("llama-3.1-8b", None, 8.03 * 2), ("llama-3.2-1b", None, 1.236 * 2), ("llama-3.1-70b", "int4", None)],
)
def test_decode_reads_every_weight_once(
    shape: str, quantization: str | None, billions: float | None, tmp_path: Path
) -> None:
    graph = graph_of(shape, tmp_path, quantization)
    config = shape_of(shape)
    table = 128256 * config["hidden_size"] * 2
    if billions is None:
        assert 35e9 < decode_bytes(graph, 0, [1]) < 40e9
        return
    whole = billions * 1e9 - (0 if config["tie_word_embeddings"] else table)
    assert decode_bytes(graph, 0, [1]) == pytest.approx(whole, rel=2e-3)
    more = decode_bytes(graph, 100.0, [7, 9]) - decode_bytes(graph, 0.0, [7])
    assert more == 100.0 * 16 + 2 * config["hidden_size"]


def test_flops_of_a_prompt_are_two_for_each_weight_and_pair(tmp_path: Path) -> None:
    found = needed_flops(graph_of("llama-3.1-8b", tmp_path), 4096, 1)
    head = 128256 * 4096
    assert found["linear"] == pytest.approx(2 * (8.03e9 - 2 * head) * 4096 + 2 * head, rel=1e-3)
    assert found["attention"] == pytest.approx(32 * 4 * 4096 * 4096 * 4097 / 2)


def test_conversations_are_those_of_the_trace(tmp_path: Path) -> None:
    bench = Bench(open_device(), tmp_path, tiny=False)
    whole, quarter = conversations(bench, 1), conversations(bench, 4)
    assert len(whole) == len(quarter) == 256
    assert 1000 < sum(prompt for prompt, _ in whole) / 256 < 1300
    assert 180 < sum(output for _, output in whole) / 256 < 250
    assert all((-(-p // 4), -(-o // 4)) == short for (p, o), short in zip(whole, quarter, strict=True))
