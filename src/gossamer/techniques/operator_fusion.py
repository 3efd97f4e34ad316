"""Operator fusion: neighbouring ops become one."""

from __future__ import annotations

from gossamer.techniques.card import Card

CARD = Card(
    name="operator_fusion",
    row="2.1",
    title="Operator fusion",
    title_zh="算子融合",
    principle="Several ops (a matrix product and its activation) become one, so that fewer intermediates "
    "are stored.",
    memory_promise="10-20% of the intermediates",
    speed_promise="1.2-1.5x",
    here="Declarative rules, pattern to replacement, each with a switch of its own (--no-fusion-rule): "
    "QKV merge, gate and up merge, activation epilogue (SiLU * up), residual epilogue, norm with residual, "
    "norm with quantization. Merged matrices are not repacked: one instruction reads several. A fused op "
    "does the arithmetic of those it replaces in their order, so on the CPU no bit changes.",
    tools=("TensorRT", "ONNX Runtime", "vLLM (partly)"),
    applicability="general",
    trade_off="the framework must support it",
    baseline="the same graph unfused",
    metrics=("arena_bytes", "ttft_ms", "itl_ms"),
    fields=("operator_fusion",),
    off="--no-operator-fusion (operator_fusion=None)",
    code=(
        "src/gossamer/config/operator_fusion.py", "src/gossamer/passes/operator_fusion.py",
        "src/gossamer/passes/rewrite.py", "src/gossamer/graph/ops/fused.py", "csrc/ops.cpp",
        "csrc/linear.cpp",
    ),
    tests=("tests/passes/test_rewrite.py", "tests/passes/test_fusion.py"),
    papers=(
        "Data Movement Is All You Need: A Case Study on Optimizing Transformers (2020), arXiv 2007.00072",
        "TVM: An Automated End-to-End Optimizing Compiler for Deep Learning (2018), arXiv 1802.04799",
    ),
    missing="RoPE with the writing of keys and values, and the final norm with the head, as one op "
    "(greedy tokens are chosen tile by tile in the head already)",
)  # fmt: skip
