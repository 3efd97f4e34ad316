"""Losses and divergences are those of torch; errors are those of sampling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.errors import ConfigError
from gossamer.quality.compare import compare, divergence, mean_error, score, text_scores
from gossamer.quality.scorer import Chunk
from gossamer.quality.windows import Document, Window


@dataclass
class Given:
    """A scorer whose logits are given, in chunks of so many rows."""

    all: npt.NDArray[np.float32]
    rows: int = 3
    context: int = 99

    @property
    def vocab(self) -> int:
        return int(self.all.shape[1])

    def logits(self, windows: Sequence[Window]) -> Iterator[Chunk]:
        targets = np.concatenate([w.targets for w in windows])
        units = np.repeat(np.arange(len(windows), dtype=np.int32), [len(w.targets) for w in windows])
        for at in range(0, len(targets), self.rows):
            part = slice(at, at + self.rows)
            yield Chunk(self.all[part], targets[part], units[part])


def windows(random: np.random.Generator, vocab: int, sizes: Sequence[int]) -> list[Window]:
    ids = [random.integers(0, vocab, size).astype(np.int32) for size in sizes]
    return [Window(i, i, document) for document, i in enumerate(ids)]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), vocab=st.integers(2, 50), scale=st.sampled_from([1e-3, 1.0, 30.0]))
def test_as_torch_computes_them(seed: int, vocab: int, scale: float) -> None:
    random = np.random.default_rng(seed)
    wins = windows(random, vocab, (4, 7, 1))
    a, b = (scale * random.standard_normal((12, vocab)).astype(np.float32) for _ in range(2))
    b = a + b * 0.1
    found = compare(Given(a), Given(b), wins)
    p, q = (torch.from_numpy(x).double().log_softmax(-1) for x in (a, b))
    targets = torch.from_numpy(np.concatenate([w.targets for w in wins])).long()
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    np.testing.assert_allclose(found.kl, kl.numpy(), atol=1e-12)
    for losses, logs in ((found.reference, p), (found.model, q), (score(Given(b), wins), q)):
        expected = torch.nn.functional.nll_loss(logs, targets, reduction="none")
        np.testing.assert_allclose(losses.nats, expected.numpy(), rtol=1e-12, atol=1e-12)
        assert losses.windows.tolist() == [0] * 4 + [1] * 7 + [2]
    result = divergence(found)
    assert result.kl_mean == pytest.approx(float(kl.mean()), abs=1e-12)
    assert result.kl_p99 == pytest.approx(float(kl.quantile(0.99)), abs=1e-9)
    assert result.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))


def test_a_model_does_not_diverge_from_itself() -> None:
    random = np.random.default_rng(0)
    logits = random.standard_normal((12, 9)).astype(np.float32)
    logits[:, 5] = -np.inf  # a token that neither can say
    wins = [replace(w, targets=w.targets % 5) for w in windows(random, 9, (4, 7, 1))]
    found = divergence(compare(Given(logits), Given(logits), wins))
    assert found.kl_mean == found.kl_p99 == 0 and found.top1 == 1


def test_vocabularies_must_be_alike() -> None:
    a, b = (np.zeros((2, vocab), np.float32) for vocab in (4, 5))
    with pytest.raises(ConfigError, match="4 tokens and the model for 5"):
        compare(Given(a), Given(b), windows(np.random.default_rng(0), 4, (2,)))


def test_errors_are_as_large_as_means_scatter() -> None:
    """Windows whose tokens hang together: the error covers the scatter of means over fresh draws."""
    random = np.random.default_rng(1)
    sizes = np.tile([5, 20, 40], 20)
    units = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)

    def draw() -> npt.NDArray[np.float64]:
        together = random.standard_normal(len(sizes))[units]
        return np.asarray(together + 0.3 * random.standard_normal(len(units)), np.float64)

    draws = [draw() for _ in range(300)]
    scatter = float(np.std([values.mean() for values in draws]))
    errors = [mean_error(values, units) or 0.0 for values in draws]
    assert float(np.mean(errors)) == pytest.approx(scatter, rel=0.12)
    assert mean_error(draws[0], np.zeros_like(units)) is None
    alone = np.arange(len(units), dtype=np.int32)  # every token for itself: the textbook's
    usual = float(draws[0].std(ddof=1) / np.sqrt(len(units)))
    assert mean_error(draws[0], alone) == pytest.approx(usual, rel=1e-9)


def test_texts_have_their_own_scores() -> None:
    random = np.random.default_rng(2)
    wins = windows(random, 9, (4, 7))
    losses = score(Given(random.standard_normal((11, 9)).astype(np.float32)), wins)
    documents = [  # of the first, one more token than is predicted
        Document("a", np.zeros(5, np.int32), np.array([100.0, 1, 2, 3, 4])),
        Document("b", np.zeros(7, np.int32), np.full(7, 3.0)),
    ]
    (a, b), whole = text_scores(losses, wins, documents)
    assert (a.tokens, a.bytes, b.tokens, b.bytes, whole.bytes) == (4, 10, 7, 21, 31)
    assert a.loss == pytest.approx(losses.nats[:4].mean()) and whole.loss == pytest.approx(losses.mean)
    assert whole.bits_per_byte == pytest.approx(losses.nats.sum() / np.log(2) / 31)
    assert b.perplexity == pytest.approx(np.exp(b.loss))
