"""Sharding and offloading: the device holds only what is being computed."""

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
    here="Of a GPU: the matrices of as many layers as do not fit within the device's byte budget lie in "
    "pinned host memory, and every step brings each by one copy into one of two buffers while layers before "
    "it compute, in recorded steps too. Any weight format, mixtures of experts included. Beside it: "
    "checkpoints in shards are read and written tensor by tensor, and KV pages of preempted requests swap to "
    "a slower tier (PagedAttention, --swap-bytes).",
    tools=("accelerate", "bitsandbytes", "TGI"),
    applicability="little memory",
    trade_off="offloading slows down",
    baseline="all of the model resident",
    metrics=("weights_bytes", "total_bytes"),
    fields=("offloading",),
    off="it is off; --offload auto or --offload SIZE turn it on (offloading=None is off)",
    code=(
        "src/gossamer/config/offloading.py", "src/gossamer/backends/cuda/streaming.py",
        "src/gossamer/backends/cuda/packing.py", "src/gossamer/runtime/cuda.py",
    ),
    tests=("tests/backends/cuda/test_streaming.py",),
    papers=(
        "FlexGen: High-Throughput Generative Inference of Large Language Models with a Single GPU (2023), "
        "arXiv 2303.06865",
        "ZeRO-Infinity: Breaking the GPU Memory Wall for Extreme Scale Deep Learning (2021), arXiv "
        "2104.07857",
        "LLM in a flash: Efficient Large Language Model Inference with Limited Memory (2023), arXiv "
        "2312.11514",
    ),
    prerequisites=("an NVIDIA GPU (--device cuda), and host memory for what does not fit there",),
    missing="weights of the CPU backend on disk, memory-mapped; cold KV pages and large intermediates in "
    "slower memory; single experts instead of whole layers of them; figures on a GPU",
)  # fmt: skip
