"""gossamer/pocket-half: gossamer/pocket pruned to half its size and taught by the whole.

Prunes, distils (2 hours of one shared core; started again it goes on), scores the held-out books for both
models and writes `src/gossamer/models/pocket-half`. Needs the tokens of `prepare.py`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evaluate import Score, score_books, total
from model import PocketConfig, build, hf_weights
from rich.console import Console
from sample import continuation
from text import clean
from tokenizers import Tokenizer

from gossamer.backends.reference import ReferenceModel
from gossamer.compress.distill import step as distill
from gossamer.compress.prune import structured
from gossamer.compress.step import Job
from gossamer.config.compression import Distil, Structured

MODELS = Path(__file__).resolve().parents[2] / "src" / "gossamer" / "models"
WORK = Path(__file__).parent / "work"
VALIDATION = 65_536  # tokens at the end of the file, as train.py keeps them back
PRUNE = Structured(hidden=0.25, layers=0.17, ffn=0.5)
DISTIL = Distil(
    steps=2400, batch=4, context=512, lr=2e-3, optimizer="muon", warmup=0.03, final=0.02, loss="forward_kl"
)
PROMPTS = ("Once upon a time", "The old man shut the door and turned to the stranger.")
FILES = ("config.json", "generation_config.json", "model.safetensors", "special_tokens_map.json",
         "tokenizer.json", "tokenizer_config.json", "loss.png")  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """A student and its teacher on the same text: how often their first choices are the same, the share of
    probability they have in common (what sampled drafts are accepted with), KL in nats per token."""

    tokens: int
    first: float
    common: float
    kl: float


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--books", type=Path, required=True, help="folder with held-out/*.txt")
    parser.add_argument("--work", type=Path, default=WORK, help="where prepare.py left the tokens")
    parser.add_argument("--teacher", type=Path, default=MODELS / "pocket")
    parser.add_argument("--out", type=Path, default=MODELS / "pocket-half")
    parser.add_argument("--steps", type=int, default=DISTIL.steps)
    args = parser.parse_args()
    torch.set_num_threads(1)
    trained, pruned, facts = make(args)
    console = Console(stderr=True)
    books = sorted((args.books / "held-out").glob("*.txt"))
    scores = []
    for directory in (trained, args.teacher):
        config, weights = read_model(directory)
        tokenizer = directory / "tokenizer.json"
        scores.append(
            score_books(books, config, weights, tokenizer, on_book=lambda score: console.print(score.name))
        )
    student, teacher = (build(*read_model(directory)) for directory in (trained, args.teacher))
    words = Tokenizer.from_file(str(trained / "tokenizer.json"))
    agreed = agreement(student, teacher, books, words)
    context = student.graph.max_positions
    samples = [(prompt, continuation(student, words, prompt, seed=1, context=context)) for prompt in PROMPTS]
    args.out.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (trained / name).exists():
            shutil.copyfile(trained / name, args.out / name)
    card = half_card(read_model(trained)[0], pruned, facts, scores, agreed, samples)
    (args.out / "README.md").write_text(card, encoding="utf-8")
    console.print(f"{args.out}: {sum(path.stat().st_size for path in args.out.iterdir()) / 1e6:.1f} MB")


def make(args: argparse.Namespace) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """Prunes and distils in work/half, as far as that is not done; the model's directory and the facts of
    both steps."""
    text = np.fromfile(args.work / "tokens.u16", np.uint16)[:-VALIDATION].astype(np.int32)
    model = args.teacher
    found = []
    steps = (
        ("pruned", structured.run, PRUNE),
        ("distilled", distill.run, Distil(**{**settings(DISTIL), "steps": args.steps})),
    )
    for name, run, config in steps:
        directory, scratch = args.work / "half" / name, args.work / "half" / f"{name}.scratch"
        facts = args.work / "half" / f"{name}.json"
        if not facts.exists():
            for each in (directory, scratch):
                each.mkdir(parents=True, exist_ok=True)
            job = Job(
                model=model, original=args.teacher, out=directory, scratch=scratch, text=text,
                context=DISTIL.context, samples=32, seed=1, threads=1, progress=Teller(),
            )  # fmt: skip
            facts.write_text(json.dumps(run(config, job), indent=2) + "\n")
        found.append(json.loads(facts.read_text()))
        model = directory
    return model, found[0], found[1]


class Teller:
    """Says how far a step is, a few times a minute."""

    def __init__(self) -> None:
        self._last = 0.0

    def __call__(self, what: str, done: int, count: int) -> None:
        if time.monotonic() - self._last > 20:
            self._last = time.monotonic()
            print(f"{time.strftime('%H:%M:%S')} {what} {done}/{count}", flush=True)


def settings(config: Distil) -> dict[str, Any]:
    """The fields of a config."""
    return {name: getattr(config, name) for name in type(config).__dataclass_fields__}


def read_model(directory: Path) -> tuple[PocketConfig, dict[str, torch.Tensor]]:
    """Shape and weights of a model's directory."""
    from gossamer.compress.model import open_model

    graph, source = open_model(directory)
    model = ReferenceModel.load(graph, source).requires_grad_(False)
    return PocketConfig.read(directory / "config.json"), hf_weights(model)


@torch.inference_mode()
def agreement(
    student: ReferenceModel, teacher: ReferenceModel, books: list[Path], words: Tokenizer, windows: int = 16
) -> Agreement:
    """On the first windows of every book, each of the whole context."""
    context = student.graph.max_positions
    tokens, first, common, kl = 0, 0.0, 0.0, 0.0
    for book in books:
        ids = words.encode(clean(book.read_text(encoding="utf-8"))).ids
        for start in range(0, min(len(ids) // context, windows) * context, context):
            window = torch.tensor([ids[start : start + context]])
            log_q, log_p = (model.logits(window)[0].log_softmax(-1) for model in (student, teacher))
            q, p = log_q.exp(), log_p.exp()
            tokens += context
            first += float((log_q.argmax(-1) == log_p.argmax(-1)).sum())
            common += float(torch.minimum(p, q).sum())
            kl += float((p * (log_p - log_q)).sum())
    return Agreement(tokens=tokens, first=first / tokens, common=common / tokens, kl=kl / tokens)


def half_card(
    c: PocketConfig,
    pruned: dict[str, Any],
    facts: dict[str, Any],
    scores: list[list[Score]],
    agreed: Agreement,
    samples: list[tuple[str, str]],
) -> str:
    """Markdown with the Hugging Face front matter. scores: of the student and of its teacher."""
    from card import _sample

    old, new = facts["teacher_parameters"] / 1e6, facts["parameters"] / 1e6
    shape = pruned["shape"]
    gone = ", ".join(
        f"{what} {shape[key][0]} -> {shape[key][1]}"
        for what, key in (("hidden width", "hidden"), ("feed-forward", "ffn"), ("layers", "layers"))
        if shape[key][0] != shape[key][1]
    )
    rows = [
        f"| {title(mine)} | {mine.tokens} | {mine.loss:.3f} | {its.loss:.3f} | {mine.perplexity:.1f} | "
        f"{its.perplexity:.1f} | {mine.bits_per_byte:.3f} |"
        for mine, its in zip(*([*s, total(s)] for s in scores), strict=True)
    ]
    return f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
base_model: gossamer/pocket
tags: [llama, storyteller, public-domain-books, pruned, distilled]
---

# gossamer/pocket-half

gossamer/pocket at half its size: {new:.1f} of {old:.1f} million parameters. It was pruned and then learned to
predict what the whole model predicts. It has the same tokenizer and vocabulary, so that it may draft for it:

    gossamer generate gossamer/pocket --prompt "Once upon a time" \\
        --speculative-config '{{"method": "draft_model", "model": "gossamer/pocket-half"}}'

What the card of gossamer/pocket says holds here as well, and more so: it goes on with a text in the manner of
old books, it is **not an assistant**, and it may repeat the views of its time.

## Shape

Llama architecture in bfloat16: {c.num_hidden_layers} layers, hidden {c.hidden_size}, feed-forward \
{c.intermediate_size}, {c.num_attention_heads} query and {c.num_key_value_heads} key/value heads of \
{c.head_dim}, {c.vocab_size} byte-level BPE entries (tied embedding), context {c.max_position_embeddings}.

## How it was made

| | |
|---|---|
| pruned | structured, by activations: {gone} (layers kept: {", ".join(map(str, pruned["layers"]))}) |
| distilled | from gossamer/pocket, forward KL divergence of its predictions at temperature 1, no other loss |
| seen | {facts["tokens"] / 1e6:.2f} M tokens of the training books in {facts["steps"]} steps \
({facts["epochs"]:.2f} epochs) |
| optimizer | Muon (matrices of the layers) and AdamW; warm-up, cosine; bfloat16 products, float32 weights |
| KL to the teacher | {facts["losses"]["forward_kl"]["first"]:.2f} nats per token after pruning, \
{facts["losses"]["forward_kl"]["last"]:.3f} at the end (training text) |

![losses over tokens seen](loss.png)

Made by `tools/pocket/half.py` of the Gossamer project.

## Held-out books

Neither model nor tokenizer was trained on any of these. Each prediction has at least a quarter of the context
before it, apart from a book's first ones. Losses are in nats per token.

| book | tokens | loss | teacher's loss | perplexity | teacher's | bits per byte |
|---|---:|---:|---:|---:|---:|---:|
{chr(10).join(rows)}

On {agreed.tokens} tokens of these books its first choice is its teacher's {agreed.first:.1%} of the time, \
the two distributions have {agreed.common:.1%} in common (the chance that a sampled draft of one token is \
accepted), and their KL divergence is {agreed.kl:.3f} nats per token.

## Sample text

Sampled at temperature 0.8, top-p 0.95, seed 1; not selected. The prompt is bold.

{chr(10).join(_sample(prompt, text) for prompt, text in samples)}
## Licence

The weights and the tokenizer are under Apache-2.0. The books are in the public domain.
"""


def title(score: Score) -> str:
    """A book's name; all of them in bold."""
    return "**all**" if score.name == "all" else score.name.replace("-", " ")


if __name__ == "__main__":
    main()
