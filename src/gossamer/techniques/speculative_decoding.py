"""Speculative decoding: tokens guessed cheaply, verified together."""

from __future__ import annotations

from gossamer.techniques.card import Card

CARD = Card(
    name="speculative_decoding",
    row="6.2",
    title="Speculative decoding",
    title_zh="投机解码",
    principle="A small model predicts, the large one verifies.",
    memory_promise="none stated; a draft takes memory of its own",
    speed_promise="1.5-2x",
    here="Guesses from the text itself (ngram, prompt lookup), a draft model of the same tokenizer, or a "
    "trained head (EAGLE style), as chains or trees, verified in one step. Acceptance is exact: noise is "
    "shared and a draft is right where it named the very token, so on the CPU the output is plain "
    "decoding's to the last bit. The length of drafts adapts on line, and a method that loses is "
    "switched off.",
    tools=("vLLM", "TGI (experimental)"),
    applicability="generation",
    trade_off="it pays where a step waits for memory and guesses come true, as on text that quotes; on "
    "prose going on it gains little, and the head trained for gossamer/pocket loses (LOG.md)",
    baseline="plain decoding",
    metrics=("itl_ms", "tokens_per_s"),
    fields=("speculative_decoding",),
    prerequisites=(
        "nothing for ngram; a model of the same tokenizer for draft_model; a head trained for the model "
        "for eagle",
    ),
    off="leave out --speculative-config (speculative_decoding=None)",
    code=(
        "src/gossamer/config/speculative_decoding.py", "src/gossamer/engine/speculative_decoding",
        "src/gossamer/runtime/draft.py", "src/gossamer/runtime/headed.py",
        "src/gossamer/graph/families/eagle.py", "src/gossamer/compress/eagle",
        "src/gossamer/bench/speculation.py",
    ),
    tests=(
        "tests/engine/speculative_decoding", "tests/exactness/test_speculation.py",
        "tests/runtime/test_draft.py", "tests/runtime/test_headed.py",
    ),
    papers=(
        "Fast Inference from Transformers via Speculative Decoding (2022), arXiv 2211.17192",
        "Accelerating Large Language Model Decoding with Speculative Sampling (2023), arXiv 2302.01318",
        "EAGLE: Speculative Sampling Requires Rethinking Feature Uncertainty (2024), arXiv 2401.15077",
        "Inference with Reference: Lossless Acceleration of Large Language Models (2023), arXiv 2304.04487",
        "SpecInfer: Accelerating Generative LLM Serving with Tree-based Speculative Inference and "
        "Verification (2023), arXiv 2305.09781",
        "SpecDec++: Boosting Speculative Decoding via Adaptive Candidate Lengths (2024), arXiv 2405.19715",
    ),
    missing="suffix decoding and Medusa",
)  # fmt: skip
