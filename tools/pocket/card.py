"""The model card, from measured facts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from evaluate import Score, total
from model import PocketConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What the card says about the run."""

    config: PocketConfig
    parameters: int
    steps: int
    tokens: int
    minutes: float
    optimizer: str
    workers: int
    finished: bool
    data: dict[str, Any]


def model_card(facts: Facts, scores: list[Score], samples: list[tuple[str, str]]) -> str:
    """Markdown with the Hugging Face front matter."""
    c, d, overall = facts.config, facts.data, total(scores)
    optimizer = "Muon (matrices) and AdamW (embedding, norms)" if facts.optimizer == "muon" else "AdamW"
    unfinished = "" if facts.finished else "\n**This is an intermediate checkpoint of an unfinished run.**\n"
    return f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [llama, storyteller, public-domain-books]
---

# gossamer/pocket

A storyteller of {facts.parameters / 1e6:.1f} million parameters: it goes on with a text in the manner of old
books. It is small enough to travel inside the package, so that every command has something real to run
on. It is **not an assistant**: it answers no questions, follows no instructions, knows no facts, and loses
the thread within a few sentences. It may repeat the views and the words of its time, which are the
nineteenth and early twentieth centuries.
{unfinished}
## Shape

Llama architecture in bfloat16: {c.num_hidden_layers} layers, hidden {c.hidden_size}, feed-forward \
{c.intermediate_size}, {c.num_attention_heads} query and {c.num_key_value_heads} key/value heads of \
{c.head_dim}, {c.vocab_size} byte-level BPE entries (tied embedding), context \
{c.max_position_embeddings} (trained at that length). `<|endofbook|>` both begins
and ends a book; a prompt needs no such token.
A text may begin like the books of the collection do: `# Title: ...`, `## Author: ...`, `## Year: ...`.

## Training

| | |
|---|---|
| data | {d["books"]} public-domain English books, {d["bytes"] / 1e6:.0f} MB, \
{d["tokens"] / 1e6:.1f} M tokens \
({d["bytes_per_token"]:.2f} bytes each) |
| seen | {facts.tokens / 1e6:.1f} M tokens in {facts.steps} steps ({facts.tokens / d["tokens"]:.2f} epochs) |
| optimizer | {optimizer}; warm-up, constant, decay; bfloat16 products, float32 weights |
| time | {facts.minutes:.0f} minutes on {facts.workers} CPU cores, pauses and other work on them included |

![loss over tokens seen](loss.png)

Made by `tools/pocket` of the Gossamer project, which says how to repeat it.

## Held-out books

None of these was in the training data or in the tokenizer's. Each prediction has at least a quarter of the
context before it, apart from a book's first ones. Bytes are those of the cleaned text (emphasis marks and
surplus white space removed). Perplexity is per token of this vocabulary; bits per byte compare across
tokenizers.

| book | tokens | loss (nats/token) | perplexity | bits per byte |
|---|---:|---:|---:|---:|
{chr(10).join(_row(score) for score in scores)}
{_row(overall, name="**all**")}

## Sample text

Sampled at temperature 0.8, top-p 0.95, seed 1; not selected. The prompt is bold.

{chr(10).join(_sample(prompt, text) for prompt, text in samples)}
## Licence

The weights and the tokenizer are under Apache-2.0. The books are in the public domain.
"""


def _row(score: Score, *, name: str | None = None) -> str:
    title = name or score.name.replace("-", " ")
    rates = f"{score.loss:.3f} | {score.perplexity:.1f} | {score.bits_per_byte:.3f}"
    return f"| {title} | {score.tokens} | {rates} |"


def _sample(prompt: str, text: str) -> str:
    bold = "\n>\n".join(f"> **{line}**" for line in prompt.split("\n\n"))
    first, *others = text.split("\n")
    return "\n".join([f"{bold}{first}", *(f"> {line}".rstrip() for line in others)]) + "\n"
