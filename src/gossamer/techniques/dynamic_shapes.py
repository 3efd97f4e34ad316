"""Dynamic shapes: one program for steps of any size."""

from __future__ import annotations

from gossamer.techniques.card import Card

CARD = Card(
    name="dynamic_shapes",
    row="2.3",
    title="Dynamic shapes",
    title_zh="动态形状",
    principle="The graph adapts to the size of its input; variable lengths need no maximum allocation.",
    memory_promise="10-30%",
    speed_promise="better batching",
    here="Dims are symbolic (T tokens, S sequences, R rows that need logits): one compiled program "
    "serves every one of them without padding. The arena is sized by the largest step there may be, not by "
    "the longest sequence. On a GPU a decode step is filled up to the next number of sequences for which "
    "one is recorded; what fills it up keeps no keys.",
    tools=("vLLM", "TGI", "TensorRT"),
    applicability="text of variable length",
    trade_off="kernels must hold for any size; a fixed shape has fewer to tune",
    baseline="steps padded to the maximum shape",
    metrics=("arena_bytes", "ttft_ms", "itl_ms", "tokens_per_s"),
    fields=("dynamic_shapes",),
    off="--no-dynamic-shapes (dynamic_shapes=None): every step is padded to --max-num-batched-tokens; "
    "`gossamer bench shapes MODEL` measures both",
    code=(
        "src/gossamer/config/dynamic_shapes.py", "src/gossamer/runtime/padded.py",
        "src/gossamer/graph/ir.py", "src/gossamer/bench/shapes.py", "csrc/program.cpp",
        "src/gossamer/backends/cuda/replay.py",
    ),
    tests=("tests/exactness/test_bits.py", "tests/bench/test_shapes.py", "tests/runtime/test_padded.py"),
    papers=(
        "Nimble: Efficiently Compiling Dynamic Neural Networks for Model Inference (2020), arXiv 2006.03031",
        "DISC: A Dynamic Shape Compiler for Machine Learning Workloads (2021), arXiv 2103.05288",
    ),
    missing="optimisation profiles",
)  # fmt: skip
