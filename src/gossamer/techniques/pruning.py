"""Pruning: weights that contribute little go."""

from __future__ import annotations

from gossamer.techniques.card import Card

CARD = Card(
    name="pruning",
    row="1.2",
    title="Pruning",
    title_zh="剪枝",
    principle="Weights or neurons that contribute little are removed.",
    memory_promise="10-50% of the parameters",
    speed_promise="1.2-1.5x",
    here="Unstructured, a share of zeros or n:m such as 2:4: magnitude, Wanda, SparseGPT. Structured: "
    "key-value heads, FFN channels, hidden width and layers, which really shrinks the graph. Recovery "
    "training on text, or from a teacher. Sparsity that is served: int8 (one scale per channel) and bf16 "
    "matrices are stored without their zeros, and a kernel reads the fewer bytes (--sparse-weights).",
    tools=("PyTorch pruning", "optimum"),
    applicability="after pre-training",
    trade_off="retrain to restore accuracy; sparse speed needs support by the hardware: here it gains "
    "for few rows on AVX-512 and loses from 16 rows on, and on AVX2 and scalar; dense int4 is smaller and "
    "faster than sparse int8 (LOG.md)",
    baseline="the dense model at the same precision",
    metrics=("weights_bytes", "total_bytes", "itl_ms"),
    steps=("prune magnitude", "prune wanda", "prune sparsegpt", "prune structured", "train recover"),
    prerequisites=(
        "torch for the steps of a recipe (pip install 'gossamer[torch]'), and text to calibrate on for all "
        "but magnitude",
        "int8 (one scale per channel) or bf16 weights for zeros to be left out of memory",
    ),
    off="serve the model that was not pruned; --no-sparse-weights (sparse_weights=None) stores the zeros "
    "of one that was",
    code=(
        "src/gossamer/config/compression/prune.py", "src/gossamer/compress/prune",
        "src/gossamer/config/sparse_weights.py", "src/gossamer/passes/sparse_weights.py",
        "src/gossamer/checkpoint/sparsity.py", "csrc/generic/sparse.h", "csrc/pack.cpp",
    ),
    tests=("tests/compress/prune", "tests/numerics/test_sparse.py", "tests/passes/test_sparse_weights.py"),
    papers=(
        "Learning both Weights and Connections for Efficient Neural Networks (2015), arXiv 1506.02626",
        "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot (2023), arXiv 2301.00774",
        "A Simple and Effective Pruning Approach for Large Language Models (Wanda, 2023), arXiv 2306.11695",
        "Compact Language Models via Pruning and Knowledge Distillation (Minitron, 2024), arXiv 2407.14679",
        "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect (2024), arXiv "
        "2403.03853",
        "Importance Estimation for Neural Network Pruning (2019), arXiv 1906.10771",
    ),
)  # fmt: skip
