"""Knowledge distillation: a small model learns what a large one predicts."""

from __future__ import annotations

from gossamer.techniques.card import Card

CARD = Card(
    name="distillation",
    row="1.3",
    title="Knowledge distillation",
    title_zh="知识蒸馏",
    principle="A large teacher guides a small student: 7B to 1B.",
    memory_promise="down to 1/10 of the size",
    speed_promise="much faster",
    here="A student that is the pruned teacher, or begins at random from a config.json; losses on logits "
    "(forward and reverse KL, Jensen-Shannon, at a temperature), on hidden states and on what attention "
    "gives, and on the text; AdamW or Muon; training that shows its progress, saves checkpoints and goes "
    "on after a kill, with the same bits. The student serves alone or drafts for its teacher (speculative "
    "decoding); gossamer/pocket-half, the student of gossamer/pocket, is in the package.",
    tools=("transformers",),
    applicability="extreme compression",
    trade_off="high cost of training: the student has a loss of its own, whatever it was taught",
    baseline="the teacher",
    metrics=("weights_bytes", "total_bytes", "ttft_ms", "itl_ms", "tokens_per_s"),
    steps=("train distil", "train recover"),
    prerequisites=(
        "torch for the steps of a recipe (pip install 'gossamer[torch]')",
        "text to learn from",
        "a teacher of the same vocabulary",
    ),
    off="serve the teacher",
    code=(
        "src/gossamer/config/compression/train.py", "src/gossamer/compress/distill",
        "src/gossamer/compress/recipes/half.toml", "src/gossamer/models",
    ),
    tests=("tests/compress/distill", "tests/compress/test_run.py"),
    papers=(
        "Distilling the Knowledge in a Neural Network (2015), arXiv 1503.02531",
        "MiniLLM: Knowledge Distillation of Large Language Models (2023), arXiv 2306.08543",
        "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes (2023), arXiv "
        "2306.13649 (its Jensen-Shannon loss)",
        "TinyBERT: Distilling BERT for Natural Language Understanding (2019), arXiv 1909.10351",
        "Compact Language Models via Pruning and Knowledge Distillation (Minitron, 2024), arXiv 2407.14679",
    ),
)  # fmt: skip
