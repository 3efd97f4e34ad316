"""Hardware-specific kernels: one body of code per instruction set, chosen when it runs."""

from __future__ import annotations

from gossamer.techniques.card import Card

CARD = Card(
    name="hardware_kernels",
    row="5.2",
    title="Hardware-specific kernels",
    title_zh="硬件专用内核",
    principle="Kernels are tuned for one target.",
    memory_promise="10-20%",
    speed_promise="2-3x",
    here="Kernels for AVX-512 (VNNI, BF16), AVX2 and plain C++ behind one table and one layout of "
    "weights, chosen when the program starts; one that is forced (--isa) and absent is an error. How each "
    "linear layer is cut into tiles is measured at the first start and remembered for the machine "
    "(--no-autotune). For NVIDIA GPUs (compute capability 8.0 or later) Triton kernels, compiled when they "
    "are first used.",
    tools=("TensorRT", "ONNX Runtime"),
    applicability="one deployment target",
    trade_off="each target is work of its own, and the first start measures for some seconds",
    baseline="the scalar kernels",
    metrics=("ttft_ms", "itl_ms", "tokens_per_s"),
    fields=("hardware_kernels",),
    prerequisites=("a processor with the instruction set, where one is forced",),
    off="--isa scalar --no-autotune (hardware_kernels=None)",
    code=(
        "src/gossamer/config/hardware_kernels.py", "src/gossamer/backends/cpu/tuning.py",
        "csrc/dispatch.cpp", "csrc/isa", "src/gossamer/backends/cuda/kernels",
    ),
    tests=("tests/numerics", "tests/backends/test_tuning.py", "tests/backends/cuda"),
    papers=(
        "Anatomy of High-Performance Matrix Multiplication (ACM TOMS, 2008)",
        "Learning to Optimize Tensor Programs (2018), arXiv 1805.08166 (choice by measurement)",
    ),
    missing="NEON; figures on a GPU",
)  # fmt: skip
