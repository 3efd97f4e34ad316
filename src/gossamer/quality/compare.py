"""Losses of one model, and the divergence of two, token by token; their means with an honest error.

Arrays: N tokens in the order of the windows, R rows of a chunk, V vocabulary. Sums are float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gossamer.errors import ConfigError
from gossamer.quality.report import Divergence, TextScore
from gossamer.quality.scorer import Chunk, Scorer
from gossamer.quality.windows import Document, Window

__all__ = ["Compared", "Losses", "compare", "divergence", "mean_error", "score", "text_scores"]

Floats = npt.NDArray[np.float64]
Advance = Callable[[int, int], None]
_PIECE = 1 << 18  # numbers that are worked on together, for the caches' sake


@dataclass(frozen=True, slots=True)
class Losses:
    """nats [N]: minus the log-probability of each token; windows [N]: the window that predicted it."""

    nats: Floats
    windows: npt.NDArray[np.int32]

    @property
    def mean(self) -> float:
        """Nats per token."""
        return float(self.nats.mean())


@dataclass(frozen=True, slots=True)
class Compared:
    """Two models on the same tokens. kl [N]: KL(reference || model) in nats; same [N]: both find the same
    token likeliest."""

    reference: Losses
    model: Losses
    kl: Floats
    same: npt.NDArray[np.bool_]


def score(scorer: Scorer, windows: Sequence[Window], advance: Advance = lambda done, total: None) -> Losses:
    """The losses of all tokens that the windows predict. advance(tokens done, tokens in all)."""
    total, done = sum(len(w.targets) for w in windows), 0
    nats, units = [np.empty(0)], [np.empty(0, np.int32)]
    for chunk in scorer.logits(windows):
        for rows in _pieces(chunk):
            x = chunk.logits[rows].astype(np.float64)
            nats.append(_log_sum(x)[0] - x[np.arange(len(x)), chunk.targets[rows]])
        units.append(chunk.windows)
        done += len(chunk.targets)
        advance(done, total)
    return Losses(np.concatenate(nats), np.concatenate(units))


def compare(
    reference: Scorer,
    model: Scorer,
    windows: Sequence[Window],
    advance: Advance = lambda done, total: None,
) -> Compared:
    """Both models' losses, and how far the model is from the reference. Raises ConfigError for models of
    different vocabularies."""
    if reference.vocab != model.vocab:
        raise ConfigError(
            f"the reference gives logits for {reference.vocab} tokens and the model for {model.vocab}; only "
            "models of one vocabulary can be compared"
        )
    total, done = sum(len(w.targets) for w in windows), 0
    parts: list[list[npt.NDArray[np.float64]]] = [[np.empty(0)] for _ in range(4)]
    units = [np.empty(0, np.int32)]
    for own, other in zip(reference.logits(windows), model.logits(windows), strict=True):
        assert np.array_equal(own.windows, other.windows)
        for rows in _pieces(own):
            found = _diverge(own.logits[rows], other.logits[rows], own.targets[rows])
            for part, values in zip(parts, found, strict=True):
                part.append(values)
        units.append(own.windows)
        done += len(own.targets)
        advance(done, total)
    p, q, kl, same = (np.concatenate(part) for part in parts)
    rows_of = np.concatenate(units)
    return Compared(Losses(p, rows_of), Losses(q, rows_of), kl, same.astype(np.bool_))


def divergence(found: Compared) -> Divergence:
    """Mean and percentiles of a comparison."""
    p95, p99 = np.quantile(found.kl, (0.95, 0.99))
    return Divergence(
        tokens=len(found.kl),
        kl_mean=float(found.kl.mean()),
        kl_error=mean_error(found.kl, found.model.windows),
        kl_p95=float(p95),
        kl_p99=float(p99),
        top1=float(found.same.mean()),
    )


def mean_error(values: Floats, units: npt.NDArray[np.int32]) -> float | None:
    """Standard error of the values' mean, where whole units (windows) were drawn and values within one hang
    together; None for a single unit. The ratio estimator of cluster sampling (Cochran, Sampling Techniques,
    1977, 3.11)."""
    _, index = np.unique(units, return_inverse=True)
    sums, sizes = np.bincount(index, values), np.bincount(index)
    count = len(sizes)
    if count < 2:
        return None
    rest = sums - values.mean() * sizes
    return float(math.sqrt(count / (count - 1) * (rest**2).sum()) / len(values))


def text_scores(
    losses: Losses, windows: Sequence[Window], documents: Sequence[Document]
) -> tuple[list[TextScore], TextScore]:
    """The score of every document, and of all tokens together."""
    of = np.asarray([window.document for window in windows], np.int32)[losses.windows]
    scores, sizes = [], 0.0
    for index, document in enumerate(documents):
        mask = of == index
        spelled = float(document.bytes[len(document.ids) - int(mask.sum()) :].sum())
        sizes += spelled
        scores.append(_text_score(document.name, losses.nats[mask], losses.windows[mask], spelled))
    return scores, _text_score("all", losses.nats, losses.windows, sizes)


def _text_score(name: str, nats: Floats, units: npt.NDArray[np.int32], spelled: float) -> TextScore:
    loss = float(nats.mean())
    return TextScore(
        name=name,
        tokens=len(nats),
        bytes=round(spelled),
        loss=loss,
        error=mean_error(nats, units),
        perplexity=math.exp(min(loss, 700)),
        bits_per_byte=float(nats.sum()) / math.log(2) / max(spelled, 1.0),
    )


def _pieces(chunk: Chunk) -> Iterator[slice]:
    count, vocab = chunk.logits.shape
    step = max(1, _PIECE // vocab)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def _log_sum(x_RV: Floats) -> tuple[Floats, Floats]:
    """Log of the sum of exponentials [R], and the probabilities [R, V]."""
    most = x_RV.max(axis=1)
    p = np.exp(x_RV - most[:, None])
    sums = p.sum(axis=1)
    p /= sums[:, None]
    return most + np.log(sums), p


def _diverge(
    own: npt.NDArray[np.float32], other: npt.NDArray[np.float32], targets: npt.NDArray[np.int32]
) -> tuple[Floats, Floats, Floats, Floats]:
    """Of some rows: losses of both, KL(own || other), and whether the largest logit is the same."""
    a, b = own.astype(np.float64), other.astype(np.float64)
    rows = np.arange(len(targets))
    (log_a, p), (log_b, _) = _log_sum(a), _log_sum(b)
    with np.errstate(invalid="ignore"):  # -inf of both: a token that neither can say
        gap = np.where(p > 0, a - b, 0.0)
    kl = np.maximum((p * gap).sum(axis=1) - log_a + log_b, 0.0)
    same = (own.argmax(axis=1) == other.argmax(axis=1)).astype(np.float64)
    return log_a - a[rows, targets], log_b - b[rows, targets], kl, same
