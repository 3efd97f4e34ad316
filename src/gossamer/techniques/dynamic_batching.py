"""Dynamic batching: how much runs at once follows lengths, memory and a goal for latency."""

from __future__ import annotations

from gossamer.techniques.card import Card

CARD = Card(
    name="dynamic_batching",
    row="4.2",
    title="Dynamic batching",
    title_zh="动态批处理",
    principle="The size of a batch follows the lengths of inputs and the hardware.",
    memory_promise="10-30%",
    speed_promise="higher throughput",
    here="The tokens of a step and the sequences running adapt on line so that 95 % of the gaps between "
    "a request's tokens stay within a goal (--itl-goal-ms), by a model of step times that is learned from "
    "the steps; newcomers may wait to join together (--max-wait-ms); static batches of prompts of like "
    "length (--length-buckets). Admission follows the free KV memory.",
    tools=("vLLM", "TGI", "ONNX Runtime"),
    applicability="NLP and real-time inference",
    trade_off="a goal for latency costs throughput where it binds; without one there is nothing to adapt "
    "to",
    baseline="a fixed batch size",
    metrics=("itl_ms", "tokens_per_s"),
    fields=("dynamic_batching",),
    prerequisites=("something to adapt to: a goal (--itl-goal-ms) or a wait (--max-wait-ms)",),
    off="leave out --itl-goal-ms and --max-wait-ms (dynamic_batching=None): a step holds what "
    "--max-num-seqs and --max-num-batched-tokens allow",
    code=(
        "src/gossamer/config/dynamic_batching.py", "src/gossamer/engine/batching/dynamic.py",
        "src/gossamer/engine/batching/budget.py", "src/gossamer/engine/step_times.py",
        "src/gossamer/bench/dynamic.py",
    ),
    tests=("tests/engine/test_dynamic.py", "tests/engine/test_step_times.py"),
    papers=(
        "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve (2024), arXiv 2403.02310",
        "Clipper: A Low-Latency Online Prediction Serving System (2016), arXiv 1612.03079",
    ),
)  # fmt: skip
