"""How many drafted tokens a target would accept, measured by the reference on known continuations.

A head drafts a chain after every token of a text, as it would while the target writes that text; a draft
counts as far as it is what the text goes on with. On text that the target wrote this is what serving gets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from gossamer.backends.reference import ReferenceModel
from gossamer.compress.eagle.train import forward, shifted
from gossamer.graph.families.eagle import FEATURES, HIDDEN
from gossamer.graph.ops.attention import KVCache, KVState, SpanRows
from gossamer.graph.ops.sampling import gumbel_noise

__all__ = ["Acceptance", "measure", "write_on"]

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Acceptance:
    """accepted[i]: share of drafts whose first i + 1 tokens are all right. drafts: how many there were."""

    accepted: tuple[float, ...]
    drafts: int

    @property
    def tokens_per_step(self) -> float:
        """Tokens that one step of the target gives on average, its own included."""
        return 1.0 + sum(self.accepted)


@torch.inference_mode()
def measure(
    target: ReferenceModel,
    head: ReferenceModel,
    ids: Ids,
    *,
    start: int,
    length: int,
    temperature: float = 0.0,
    seeds: Sequence[int] = (),
) -> Acceptance:
    """Drafts `length` tokens after each token from `start` - 1 on of sequences [B, L].

    At a temperature above 0 the head draws with the noise the target drew the text with: seeds of each
    sequence, token `start` being output 0.
    """
    batch, total = ids.shape
    features = forward(target, torch.from_numpy(ids))[HIDDEN]
    given = shifted(features, torch.from_numpy(ids)).view(batch, total, -1)
    cache: KVCache = {}
    hits = np.zeros(length, np.int64)
    drafts = 0
    _step(head, cache, ids[:, : start - 1], given[:, : start - 1], 0)
    for last in range(start - 1, total - length):
        tokens, feature = ids[:, last : last + 1], given[:, last : last + 1]
        alive = np.ones(batch, bool)
        for depth in range(length):
            logits, hidden = _step(head, cache, tokens, feature, last + depth)
            index = last + 1 + depth - start
            chosen = _choose(logits, temperature, seeds, index)
            alive &= chosen == ids[:, last + 1 + depth]
            hits[depth] += int(alive.sum())
            tokens, feature = chosen[:, None], hidden
        drafts += batch
    return Acceptance(tuple((hits / drafts).tolist()), drafts)


@torch.inference_mode()
def write_on(
    target: ReferenceModel, prompts: Ids, tokens: int, *, temperature: float = 0.0, seeds: Sequence[int] = ()
) -> Ids:
    """Prompts [B, P] with so many tokens of the target's own after each, [B, P + tokens]."""
    cache: KVCache = {}
    ids, at = prompts, 0
    for index in range(tokens):
        logits, _ = _step(target, cache, ids[:, at:], None, at)
        at = ids.shape[1]
        ids = np.concatenate([ids, _choose(logits, temperature, seeds, index)[:, None]], 1)
    return ids


def _step(
    model: ReferenceModel, cache: KVCache, ids: Ids, features: torch.Tensor | None, start: int
) -> tuple[npt.NDArray[np.float32], torch.Tensor]:
    """Logits [B, V] and hidden [B, 1, D] of the last of these tokens [B, T] in slots from `start` on."""
    batch, count = ids.shape
    spans = tuple(SpanRows(b, b * count, count, start) for b in range(batch))
    rows = torch.arange(1, batch + 1) * count - 1
    out = model(
        torch.from_numpy(ids).flatten(),
        torch.arange(start, start + count).repeat(batch),
        rows,
        KVState(spans, cache),
        ("logits", HIDDEN),
        None if features is None else {FEATURES: features.flatten(0, 1)},
    )
    return out["logits"].float().numpy(), out[HIDDEN][rows][:, None]


def _choose(logits: npt.NDArray[np.float32], temperature: float, seeds: Sequence[int], index: int) -> Ids:
    if temperature == 0:
        return np.asarray(logits.argmax(-1), np.int64)
    noise = np.stack([gumbel_noise(seed, index, logits.shape[1]) for seed in seeds])
    chosen: Ids = (logits.astype(np.float64) / temperature + noise).argmax(-1)
    return chosen
