"""Sampling for the model card: no cache, one text."""

from __future__ import annotations

import torch
from model import logits_at
from tokenizers import Tokenizer

from gossamer.backends.reference import ReferenceModel


@torch.no_grad()
def continuation(
    model: ReferenceModel,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    seed: int,
    context: int,
    count: int = 220,
    temperature: float = 0.8,
    top_p: float = 0.95,
    end_of_book: int = 0,
) -> str:
    """Up to `count` tokens after `prompt`, sampled with temperature and nucleus (Holtzman et al. 2020)."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = tokenizer.encode(prompt).ids
    start = len(ids)
    for _ in range(min(count, context - start)):
        logits_V = logits_at(model, torch.tensor([ids]), torch.tensor([len(ids) - 1]))[0] / temperature
        weights_V, order_V = logits_V.softmax(-1).sort(descending=True)
        weights_V[weights_V.cumsum(-1) - weights_V > top_p] = 0.0
        token = int(order_V[torch.multinomial(weights_V, 1, generator=generator)])
        if token == end_of_book:
            break
        ids.append(token)
    text: str = tokenizer.decode(ids[start:])
    return text
