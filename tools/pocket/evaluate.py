"""Held-out loss: nats per token, perplexity and bits per byte of books the model never saw."""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from model import PocketConfig, build, logits_at
from text import clean
from tokenizers import Tokenizer

from gossamer.backends.reference import ReferenceModel


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """Sums over a text; the rates follow from them."""

    name: str
    tokens: int
    size_bytes: int
    nats: float

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """Per token of our own vocabulary, so not to be compared across tokenizers."""
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Per UTF-8 byte, so comparable across tokenizers."""
        return self.nats / math.log(2) / self.size_bytes


def total(scores: list[Score]) -> Score:
    """All texts as one."""
    return Score(
        name="all",
        tokens=sum(s.tokens for s in scores),
        size_bytes=sum(s.size_bytes for s in scores),
        nats=sum(s.nats for s in scores),
    )


def windows(count: int, context: int, stride: int) -> list[tuple[int, int, int]]:
    """`(start, scored_from, end)` over predictions `0 ... count - 1`, every one scored once.

    After the first window each prediction has at least `context - stride` tokens before it.
    """
    spans: list[tuple[int, int, int]] = []
    scored = 0
    while scored < count:
        end = min(count, scored + stride if spans else context)
        spans.append((max(0, end - context), scored, end))
        scored = end
    return spans


@torch.no_grad()
def score_ids(
    model: ReferenceModel, ids: list[int], *, context: int, stride: int, batch: int = 8, bf16: bool = False
) -> float:
    """Summed nats of `ids[1:]`, given what precedes; with `bf16`, matrix products in bfloat16."""
    tokens = torch.tensor(ids)
    groups: dict[int, list[tuple[int, int, int]]] = {}
    for span in windows(len(ids) - 1, context, stride):
        groups.setdefault(span[2] - span[0], []).append(span)
    nats = 0.0
    for spans in groups.values():
        for first in range(0, len(spans), batch):
            part = spans[first : first + batch]
            inputs_BT = torch.stack([tokens[start:end] for start, _, end in part])
            targets_R = torch.cat([tokens[scored + 1 : end + 1] for _, scored, end in part])
            rows_R = torch.cat(
                [
                    torch.arange(i * inputs_BT.shape[1] + scored - start, (i + 1) * inputs_BT.shape[1])
                    for i, (start, scored, _) in enumerate(part)
                ]
            )
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits_RV = logits_at(model, inputs_BT, rows_R)
            nats += F.cross_entropy(logits_RV.float(), targets_R, reduction="none").double().sum().item()
    return nats


def _score_book(job: tuple[Path, PocketConfig, dict[str, torch.Tensor], str, int, int]) -> Score:
    path, config, weights, tokenizer_path, end_of_book, stride = job
    torch.set_num_threads(1)
    model = build(config, weights)
    text = clean(path.read_text(encoding="utf-8"))
    ids = [end_of_book, *Tokenizer.from_file(tokenizer_path).encode(text).ids]
    nats = score_ids(model, ids, context=config.max_position_embeddings, stride=stride, bf16=True)
    return Score(name=path.stem, tokens=len(ids) - 1, size_bytes=len(text.encode()), nats=nats)


def score_books(
    books: list[Path],
    config: PocketConfig,
    weights: dict[str, torch.Tensor],
    tokenizer: Path,
    *,
    end_of_book: int = 0,
    on_book: Callable[[Score], None] = lambda _: None,
) -> list[Score]:
    """One score per book, in the order of `books`; one process per core, the longest books first.

    The text is cleaned exactly as the training books were, and the bytes counted are those of the cleaned
    text. Each prediction has at least a quarter of the context before it, apart from a book's first ones.
    Products are in bfloat16 (2e-5 nats per token from float32 here).
    """
    stride = config.max_position_embeddings * 3 // 4
    order = sorted(books, key=lambda path: -path.stat().st_size)
    jobs = [(path, config, weights, str(tokenizer), end_of_book, stride) for path in order]
    scores: dict[str, Score] = {}
    workers = len(os.sched_getaffinity(0))
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for score in pool.imap_unordered(_score_book, jobs):
            scores[score.name] = score
            on_book(score)
    return [scores[path.stem] for path in books]
