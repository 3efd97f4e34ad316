"""Mixed precision: half-width weights and products, float32 where it matters."""

from __future__ import annotations

from gossamer.techniques.card import Card

CARD = Card(
    name="mixed_precision",
    row="5.1",
    title="Mixed precision",
    title_zh="混合精度",
    principle="FP16 and FP32 are mixed, with Tensor Cores for the halves (7B: 14 GB become 7).",
    memory_promise="~50%",
    speed_promise="1.5-2x",
    here="A type for every matrix by rule or by name (--weight-format): bf16 or fp16 weights and "
    "products, while norms, softmax, the residual and logits stay in fp32. By default weights have the "
    "type that config.json says the checkpoint has. Formats by measured sensitivity are mixed bits, a step "
    "of quantization.",
    tools=("PyTorch", "TensorRT", "transformers"),
    applicability="modern GPUs; here processors with AVX-512 BF16, others widen",
    trade_off="half of the mantissa goes: bf16 keeps fp32's range, fp16 more of its digits",
    baseline="fp32",
    metrics=("weights_bytes", "total_bytes", "ttft_ms", "itl_ms"),
    fields=("mixed_precision",),
    by_default="as stored",
    off="--dtype float32 (mixed_precision=None)",
    code=(
        "src/gossamer/config/mixed_precision.py", "src/gossamer/config/weight_formats.py",
        "src/gossamer/passes/mixed_precision.py", "src/gossamer/passes/weight_formats.py",
    ),
    tests=("tests/numerics/test_cpu_ops.py", "tests/passes/test_weight_formats.py"),
    papers=(
        "Mixed Precision Training (2017), arXiv 1710.03740 (its inference half)",
        "A Study of BFLOAT16 for Deep Learning Training (2019), arXiv 1905.12322",
    ),
)  # fmt: skip
