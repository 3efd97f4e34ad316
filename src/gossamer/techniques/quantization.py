"""Quantization: numbers in few bits."""

from __future__ import annotations

from gossamer.techniques.card import Card

CARD = Card(
    name="quantization",
    row="1.1",
    title="Quantization",
    title_zh="量化",
    principle="Weights and activations go from high to low precision: FP32 to FP16, INT8, 4 bits.",
    memory_promise="50-75% less; FP16 halves, INT8 halves again; a 7B model at 4 bits takes 4-6 GB, not 14",
    speed_promise="1.5-2x",
    here="Weights in int8 (a scale per output channel, or per group of 16 or 32 inputs), int4 and uint4 "
    "(symmetric and asymmetric, groups of 32, 64 or 128) and NF4 (through a codebook of 16 int8 levels), "
    "each matrix its own if so asked; activations int8 with a scale per token, or static scales from "
    "calibration (SmoothQuant); keys and values in int8 or int4 (--kv-cache-dtype). On GPUs that have it, "
    "weights, activations beside them, keys and values in fp8 (E4M3). Made at load by "
    "round-to-nearest, or ahead of serving by GPTQ, AWQ, SmoothQuant, mixed bits under a byte budget from "
    "measured sensitivities, and KV calibration. Reads compressed-tensors, GPTQ, AWQ, bitsandbytes (NF4, "
    "int8) and GGUF, their integers served as they are; writes compressed-tensors, GPTQ and GGUF. bf16 and "
    "fp16 weights are mixed precision's.",
    tools=("bitsandbytes (4/8-bit)", "TensorRT (INT8)", "ONNX Runtime (FP16/INT8)"),
    applicability="nearly all models",
    trade_off="weigh the accuracy lost: `gossamer eval` measures perplexity and KL, and a compressed "
    "model carries a certificate of them",
    baseline="fp32 and bf16 of the same model",
    metrics=("weights_bytes", "total_bytes", "itl_ms", "tokens_per_s"),
    fields=("quantization",),
    steps=(
        "quantize rtn", "quantize gptq", "quantize awq", "quantize smoothquant", "quantize mixed_bits",
        "quantize kv_calibration",
    ),
    prerequisites=(
        "torch for the steps of a recipe (pip install 'gossamer[torch]'), and text to calibrate on for all "
        "but rtn",
        "inputs of a layer that are whole groups, or rows are padded",
    ),
    off="leave out --quantization (quantization=None); a checkpoint that is stored quantized stays so",
    code=(
        "src/gossamer/config/quantization.py", "src/gossamer/config/weight_formats.py",
        "src/gossamer/passes/quantization.py", "src/gossamer/passes/weight_formats.py",
        "src/gossamer/graph/ops/formats.py", "src/gossamer/compress/quantize",
        "src/gossamer/checkpoint/packed.py", "src/gossamer/checkpoint/codes.py", "csrc/pack.cpp",
        "csrc/isa/linear_avx512.h", "csrc/isa/linear_avx2.h", "csrc/generic/linear.h",
        "src/gossamer/backends/cuda/kernels/linear_fp8.py",
    ),
    tests=(
        "tests/numerics/test_formats.py", "tests/graph/test_formats.py",
        "tests/passes/test_weight_formats.py", "tests/compress/quantize", "tests/checkpoint",
        "tests/quality", "tests/backends/cuda",
    ),
    papers=(
        "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers (2022), arXiv "
        "2210.17323",
        "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration (2023), arXiv "
        "2306.00978",
        "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models (2022), "
        "arXiv 2211.10438",
        "QLoRA: Efficient Finetuning of Quantized LLMs (2023), arXiv 2305.14314 (NF4)",
        "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale (2022), arXiv 2208.07339",
    ),
    missing="fp8 checkpoints as they are; export to ONNX and TensorRT",
)  # fmt: skip
