"""Continuous batching: requests join and leave the running batch at every step."""

from __future__ import annotations

from gossamer.techniques.card import Card

CARD = Card(
    name="continuous_batching",
    row="4.1",
    title="Continuous batching",
    title_zh="连续批处理",
    principle="Requests join and leave the running batch.",
    memory_promise="10-30%",
    speed_promise="2-10x throughput",
    here="Scheduling at every step under a token budget, with prefill in chunks beside the others' "
    "tokens; one rank from fair queueing over users and from priorities, with ageing; preemption by "
    "computing again or by swap, whichever is cheaper (--preempt-by); requests can be aborted at any time.",
    tools=("vLLM", "TGI"),
    applicability="high concurrency (chat APIs)",
    trade_off="a newcomer's prompt takes part of a step that others wait for; against ragged static "
    "batching that is told every output's length it gains little throughput, but much of the time to first "
    "token (LOG.md)",
    baseline="static batching of the same requests",
    metrics=("ttft_ms", "tokens_per_s"),
    fields=("continuous_batching",),
    off="--static-batching ragged, or padded (continuous_batching=None, static_batching=StaticBatching())",
    code=(
        "src/gossamer/config/continuous_batching.py", "src/gossamer/config/static_batching.py",
        "src/gossamer/engine/batching/continuous.py", "src/gossamer/engine/batching/static.py",
        "src/gossamer/engine/waiting.py",
    ),
    tests=(
        "tests/engine/test_batching.py", "tests/engine/test_waiting.py", "tests/engine/test_exactness.py",
        "tests/exactness/test_engine.py",
    ),
    papers=(
        "Orca: A Distributed Serving System for Transformer-Based Generative Models (OSDI 2022)",
        "SARATHI: Efficient LLM Inference by Piggybacking Decodes with Chunked Prefills (2023), arXiv "
        "2308.16369",
        "Fairness in Serving Large Language Models (2023), arXiv 2401.00588",
    ),
)  # fmt: skip
