"""Parallel computing: several workers share an op."""

from __future__ import annotations

from gossamer.techniques.card import Card

CARD = Card(
    name="parallel_computing",
    row="4.3",
    title="Parallel computing",
    title_zh="并行计算",
    principle="Several GPUs or Tensor Cores run matrix products in parallel.",
    memory_promise="none stated",
    speed_promise="2-4x",
    here="Threads within an op, each on a core of its own: a native pool in which each worker walks its "
    "own stretch of tiles, then takes from the ends of the others'. The bits are the same for any number "
    "of threads.",
    tools=("accelerate", "TensorRT", "vLLM"),
    applicability="several GPUs; here several cores",
    trade_off="decoding few sequences waits for memory, which threads share",
    baseline="one worker",
    metrics=("ttft_ms", "itl_ms", "tokens_per_s"),
    fields=("parallel_computing",),
    off="--threads 1 (parallel_computing=None)",
    code=("src/gossamer/config/parallel_computing.py", "csrc/threads.cpp"),
    tests=("tests/exactness/test_bits.py",),
    papers=(
        "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism (2019), "
        "arXiv 1909.08053",
        "GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism (2018), arXiv "
        "1811.06965",
    ),
    missing="tensor parallelism, pipeline parallelism, data-parallel replicas; NCCL, gloo and shared "
    "memory; Ray for several machines",
)  # fmt: skip
