"""PagedAttention: keys and values in pages, grown on demand."""

from __future__ import annotations

from gossamer.techniques.card import Card

CARD = Card(
    name="paged_attention",
    row="3.1",
    title="PagedAttention",
    title_zh="分页注意力",
    principle="The KV cache lies in pages that are taken on demand, like virtual memory (7B: 7 GB of KV "
    "become 5).",
    memory_promise="20-50% of the KV cache",
    speed_promise="2-5x throughput",
    here="A pool of KV pages and a table for each sequence; pages grow with the sequence, chunk by chunk "
    "while its prompt is computed. Outputs of one request (n > 1) and prompts that begin alike share full "
    "pages by count, and of a page that they share in part each has a copy; the prefix cache keeps pages "
    "of ended requests and finds them by a keyed digest. Pages of sequences that make room are computed "
    "again or swapped (--swap-bytes): to a file, or from a GPU to host memory. Pages that slide out of "
    "an attention window go back.",
    tools=("vLLM", "TGI (partly)"),
    applicability="LLM generation",
    trade_off="attention reads through a table, and the last page of a sequence is part empty",
    baseline="contiguous KV of the maximum length for each slot, in the same memory",
    metrics=("kv_bytes", "ttft_ms", "tokens_per_s"),
    fields=("paged_attention", "prefix_cache"),
    off="--no-paged-attention (paged_attention=None, prefix_cache=None); the prefix cache alone: "
    "--no-enable-prefix-caching (prefix_cache=None)",
    code=(
        "src/gossamer/config/paged_attention.py", "src/gossamer/config/prefix_cache.py",
        "src/gossamer/engine/pages.py", "src/gossamer/engine/state.py",
        "src/gossamer/engine/prefix_cache.py", "src/gossamer/runtime/swap.py",
        "src/gossamer/backends/cuda/swap.py", "csrc/kv_layout.cpp",
        "csrc/generic/kv.h", "csrc/generic/attention_keys.h",
    ),
    tests=(
        "tests/engine/test_pages.py", "tests/engine/test_prefix_cache.py", "tests/engine/test_swap.py",
        "tests/runtime/test_swap.py", "tests/numerics/test_attention.py", "tests/exactness",
    ),
    papers=(
        "Efficient Memory Management for Large Language Model Serving with PagedAttention (2023), arXiv "
        "2309.06180",
        "SGLang: Efficient Execution of Structured Language Model Programs (RadixAttention, 2023), arXiv "
        "2312.07104",
    ),
    missing="beam search",
)  # fmt: skip
