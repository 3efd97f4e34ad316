"""Layer fusion: attention and MLP blocks run as units over tiles of rows."""

from __future__ import annotations

from gossamer.techniques.card import Card

CARD = Card(
    name="layer_fusion",
    row="2.2",
    title="Layer fusion",
    title_zh="层融合",
    principle="Several layers (attention and feed-forward) become one unit of computation.",
    memory_promise="5-15%",
    speed_promise="faster",
    here="Every attention block and every MLP block is one unit that goes over tiles of rows "
    "(--layer-fusion-rows): its intermediates stay in the caches and exist for a tile's rows alone, never "
    "for all tokens. A whole step is one native call. On a GPU decode steps are recorded, and are one "
    "launch then (CUDA graphs). No bit changes.",
    tools=("TensorRT", "ONNX Runtime (partly)"),
    applicability="Transformers",
    trade_off="it saves memory of intermediates; in time no difference was found here (LOG.md)",
    baseline="the graph with operators fused",
    metrics=("arena_bytes", "total_bytes", "ttft_ms"),
    fields=("layer_fusion",),
    off="--no-layer-fusion (layer_fusion=None)",
    code=(
        "src/gossamer/config/layer_fusion.py", "src/gossamer/passes/layer_fusion.py",
        "src/gossamer/graph/ir.py", "csrc/program.cpp", "src/gossamer/backends/cuda/replay.py",
    ),
    tests=("tests/passes/test_fusion.py",),
    papers=(
        "Data Movement Is All You Need: A Case Study on Optimizing Transformers (2020), arXiv 2007.00072",
    ),
    missing="the decoder layer as one unit; figures on a GPU",
)  # fmt: skip
