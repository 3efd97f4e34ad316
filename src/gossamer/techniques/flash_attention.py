"""FlashAttention: scores never leave a tile."""

from __future__ import annotations

from gossamer.techniques.card import Card

CARD = Card(
    name="flash_attention",
    row="5.3",
    title="FlashAttention",
    title_zh="FlashAttention",
    principle="Attention is rewritten to read and write less device memory.",
    memory_promise="50-70% of attention's memory",
    speed_promise="2-3x",
    here="Attention over pages in tiles with an online softmax: scores exist for one tile, never for a "
    "whole context. Prefill and decode, fixed splits of 512 keys merged in order (so that bits follow "
    "neither batch nor threads), grouped queries, causal masks and token trees, sliding windows, "
    "soft-caps; keys and values in fp32, fp16, bf16, int8 and int4. On a GPU Triton kernels for prefill and "
    "for decode, the latter's splits chosen by the step, keys and values in all of these but int4.",
    tools=("vLLM", "TGI", "transformers (partly)"),
    applicability="Transformers",
    trade_off="a kernel of its own for every kind of attention",
    baseline="scores written out in full",
    metrics=("arena_bytes", "total_bytes", "ttft_ms", "itl_ms"),
    fields=("flash_attention",),
    off="--no-flash-attention (flash_attention=None): scores are written to memory, with the memory they "
    "need in the byte plan",
    code=(
        "src/gossamer/config/flash_attention.py", "csrc/generic/attention.h",
        "csrc/generic/attention_tile.h", "csrc/generic/attention_kinds.h", "csrc/generic/softmax.h",
        "csrc/generic/gemm.h", "csrc/generic/dots.h",
        "src/gossamer/backends/cuda/kernels/attention.py",
        "src/gossamer/backends/cuda/kernels/attention_prefill.py",
        "src/gossamer/backends/cuda/kernels/attention_decode.py",
    ),
    tests=(
        "tests/numerics/test_attention.py", "tests/numerics/test_attention_materialised.py",
        "tests/exactness/test_bits.py", "tests/backends/cuda/test_attention.py",
    ),
    papers=(
        "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness (2022), arXiv "
        "2205.14135",
        "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning (2023), arXiv "
        "2307.08691",
        "Online normalizer calculation for softmax (2018), arXiv 1805.02867",
        "Self-attention Does Not Need O(n^2) Memory (2021), arXiv 2112.05682",
    ),
    missing="figures on a GPU",
)  # fmt: skip
