"""Sequence parallelism: one long sequence over several workers. Not built yet."""

from __future__ import annotations

from gossamer.techniques.card import Card

CARD = Card(
    name="sequence_parallelism",
    row="6.1",
    title="Sequence parallelism",
    title_zh="序列并行",
    principle="Long sequences are sharded over GPUs.",
    memory_promise="shared by the workers",
    speed_promise="little slowdown",
    here="Nothing of the technique. A sequence lives in one process; its threads share each op.",
    tools=("accelerate", "vLLM"),
    applicability="long text",
    trade_off="workers exchange keys and values, or heads, in every layer",
    baseline="one rank",
    metrics=("kv_bytes", "ttft_ms"),
    off="it is off: there is nothing to switch yet",
    code=(),
    tests=(),
    papers=(
        "Ring Attention with Blockwise Transformers for Near-Infinite Context (2023), arXiv 2310.01889",
        "DeepSpeed Ulysses: System Optimizations for Enabling Training of Extreme Long Sequence "
        "Transformer Models (2023), arXiv 2309.14509",
        "Reducing Activation Recomputation in Large Transformer Models (2022), arXiv 2205.05198",
    ),
    missing="all of it: ring attention (merged by the online softmax) and Ulysses (all-to-all over "
    "heads) for long prefill, keys and values split across ranks for decode, and norms sharded by sequence "
    "under tensor parallelism, which is not built either",
    built=False,
)  # fmt: skip
