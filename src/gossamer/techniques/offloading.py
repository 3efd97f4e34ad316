"""Sharding and offloading: the device holds only what is being computed. Not built yet."""

from __future__ import annotations

from gossamer.techniques.card import Card

CARD = Card(
    name="offloading",
    row="3.2",
    title="Sharding and offloading",
    title_zh="分片与卸载",
    principle="Weights or intermediate results are sharded over GPUs, CPU and disk; the device holds "
    "only what is being computed (70B on 24 GB).",
    memory_promise="50-90% less; one 24 GB GPU runs a 70B model",
    speed_promise="0.5-1x",
    here="Nothing of the technique itself: a model that does not fit is refused before any of it is "
    "loaded, with what would fit. What there is beside it: checkpoints in shards are read and written "
    "tensor by tensor, and KV pages of preempted requests swap to disk (PagedAttention, --swap-bytes).",
    tools=("accelerate", "bitsandbytes", "TGI"),
    applicability="little memory",
    trade_off="offloading slows down",
    baseline="all of the model resident",
    metrics=("weights_bytes", "total_bytes"),
    off="it is off: there is nothing to switch yet",
    code=(),
    tests=(),
    papers=(
        "FlexGen: High-Throughput Generative Inference of Large Language Models with a Single GPU (2023), "
        "arXiv 2303.06865",
        "ZeRO-Infinity: Breaking the GPU Memory Wall for Extreme Scale Deep Learning (2021), arXiv "
        "2104.07857",
        "LLM in a flash: Efficient Large Language Model Inference with Limited Memory (2023), arXiv "
        "2312.11514",
    ),
    missing="placement of weights, cold KV pages and large intermediates over device, CPU and disk by a "
    "byte budget, with double-buffered prefetch and memory-mapped weights",
    built=False,
)  # fmt: skip
