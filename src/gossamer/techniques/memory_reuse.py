"""Memory reuse: intermediates share one arena."""

from __future__ import annotations

from gossamer.techniques.card import Card

CARD = Card(
    name="memory_reuse",
    row="3.3",
    title="Memory reuse",
    title_zh="内存复用",
    principle="Blocks of memory are scheduled for reuse, so that less is allocated twice.",
    memory_promise="10-20% of the peak",
    speed_promise="little effect",
    here="Liveness of every intermediate gives one arena with offsets (greedy by size, verified free of "
    "overlaps), and the same arena for every step. It is taken and touched at the start, "
    "from the byte plan.",
    tools=("TensorRT", "ONNX Runtime", "vLLM"),
    applicability="general",
    trade_off="little effect on speed",
    baseline="one buffer for each intermediate",
    metrics=("arena_bytes", "total_bytes"),
    fields=("memory_reuse",),
    off="--no-memory-reuse (memory_reuse=None)",
    code=(
        "src/gossamer/config/memory_reuse.py", "src/gossamer/passes/memory_reuse.py",
        "src/gossamer/backends/cpu/program.py",
    ),
    tests=("tests/passes/test_memory_reuse.py",),
    papers=("Efficient Memory Management for Deep Neural Net Inference (2020), arXiv 2001.03288",),
)  # fmt: skip
