"""Logits of windows are those of the model, however steps are filled; perplexity is that of transformers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.backends.reference import ReferenceModel
from gossamer.checkpoint.hub import resolve_model
from gossamer.checkpoint.safetensors_writer import write_safetensors
from gossamer.checkpoint.tokenizer import Tokenizer
from gossamer.checkpoint.weights import DummySource
from gossamer.config import EngineConfig, ParallelComputing, Quantization
from gossamer.errors import CheckpointError, ConfigError
from gossamer.graph.families import build_graph
from gossamer.graph.weights import leaves
from gossamer.quality import scorer as scorer_module
from gossamer.quality.compare import score
from gossamer.quality.measure import measure, reference_config
from gossamer.quality.scorer import ModelScorer, open_scorer
from gossamer.quality.windows import Window, read_texts
from tests.exactness.models import CONFIG

VOCAB = CONFIG["vocab_size"]
assert isinstance(VOCAB, int)


@cache
def directory() -> str:
    """A small architecture of two KV groups, one of them windowed, for dummy weights."""
    found = mkdtemp()
    Path(found, "config.json").write_text(json.dumps(CONFIG))
    return found


def config(**options: Any) -> EngineConfig:
    return EngineConfig(
        model=directory(), load_format="dummy", parallel_computing=ParallelComputing(threads=1), **options
    )


@cache
def opened(backend: str, kv: str = "f32", paged: bool = True) -> ModelScorer:
    more: dict[str, Any] = {} if paged else {"paged_attention": None, "prefix_cache": None}
    return open_scorer(config(backend=backend, kv_dtype=kv, **more), 96)


@cache
def model() -> ReferenceModel:
    graph = build_graph(CONFIG)
    return ReferenceModel.load(graph, DummySource(graph))


def windows(shapes: Sequence[tuple[int, int]], seed: int) -> list[Window]:
    """Windows of (length, how many of it predict)."""
    random = np.random.default_rng(seed)
    ids = [random.integers(0, VOCAB, length + 1).astype(np.int32) for length, _ in shapes]
    return [Window(i[:-1], i[-count:]) for i, (_, count) in zip(ids, shapes)]


def logits(scorer: ModelScorer, wins: Sequence[Window]) -> npt.NDArray[np.float32]:
    """Of all windows, in order; the targets and windows of the chunks are checked."""
    chunks = [(c.logits.copy(), c.targets, c.windows) for c in scorer.logits(wins)]
    found, targets, units = (np.concatenate(parts) for parts in zip(*chunks))
    assert targets.tolist() == [t for w in wins for t in w.targets.tolist()]
    assert units.tolist() == [i for i, w in enumerate(wins) for _ in w.targets]
    return np.asarray(found)


shapes = st.lists(
    st.integers(1, 96).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))), min_size=1, max_size=30
)


@settings(max_examples=12, deadline=None)
@given(shapes=shapes, seed=st.integers(0, 99), paged=st.booleans())
def test_logits_are_those_of_the_model_whatever_shares_a_step(
    shapes: list[tuple[int, int]], seed: int, paged: bool
) -> None:
    wins = windows(shapes, seed)
    together = logits(opened("cpu", paged=paged), wins)
    alone = np.concatenate([logits(opened("cpu"), [w]) for w in wins])
    assert np.array_equal(together, alone)
    with torch.no_grad():
        expected = [model().logits(torch.from_numpy(w.ids)[None].long())[0] for w in wins]
    expected = [e[-len(w.targets) :].numpy() for e, w in zip(expected, wins)]  # type: ignore[misc]
    for found in (together, logits(opened("reference"), wins)):
        np.testing.assert_allclose(found, np.concatenate(expected), atol=2e-4)


def test_windows_longer_than_a_step_go_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps whose tokens, or whose rows, are fewer than a window's."""
    wins = windows([(96, 96), (50, 3), (96, 1)], 0)
    whole = logits(opened("cpu"), wins)
    for name, value in (("_TOKENS", 20), ("_LOGITS", 4 * VOCAB * 18)):
        with monkeypatch.context() as patch:
            patch.setattr(scorer_module, name, value)
            for backend in ("cpu", "reference"):
                small = open_scorer(config(backend=backend, kv_dtype="f32"), 96)
                assert small.executor.limits.max_rows < 30
                found = logits(small, wins)
                assert backend == "reference" or np.array_equal(found, whole)
                np.testing.assert_allclose(found, whole, atol=2e-4)
                small.close()


def test_what_cannot_be_scored_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="window of 97 tokens"):
        list(opened("cpu").logits(windows([(97, 1)], 0)))
    with pytest.raises(ConfigError, match="context of 513 tokens"):
        open_scorer(config(), 513)
    graph = build_graph(CONFIG)
    source = DummySource(graph)
    names = [leaf.name for weight in graph.weights.values() for leaf in leaves(weight.expr)]
    tensors = {name: np.array(source.read(name), np.float32) for name in names}
    next(iter(tensors.values()))[...] = np.nan
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    write_safetensors(tmp_path / "model.safetensors", tensors)
    broken = open_scorer(replace(config(), model=str(tmp_path), load_format="auto"), 32)
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        list(broken.logits(windows([(9, 4)], 0)))


def test_an_execution_names_what_ran() -> None:
    scorer = open_scorer(config(quantization=Quantization.parse("int4-g32"), kv_dtype="int8"), 32)
    score(scorer, windows([(30, 30)], 0))
    found = scorer.execution()
    assert found.formats == {"int4-g32": 1.0} and found.kv == "int8" and found.backend == "cpu"
    assert any(k.startswith("linear_") and k.endswith("_int4") for k in found.kernels)
    assert not any(k.endswith("_f32") for k in found.kernels)
    scorer.close()


def transformers_nats(directory: Path, ids: list[int], context: int, stride: int) -> list[float]:
    """As the page on perplexity of fixed-length models does, every token for itself."""
    import transformers

    net = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    out: list[float] = []
    before = 0
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids))
        part = torch.tensor(ids[begin:end])
        with torch.no_grad():
            logs = net(part[None]).logits[0].double().log_softmax(-1)
        count = min(end - before, end - begin - 1)
        out += (-logs[-count - 1 : -1].gather(1, part[-count:, None])[:, 0]).tolist()
        before = end
        if end == len(ids):
            break
    return out


def test_perplexity_is_that_of_transformers(shared: Path) -> None:
    """A model without a begin token (so that windows are the same), and one that begins a single window."""
    stories, pocket = shared / "models" / "stories260K", "gossamer/pocket"
    texts = read_texts([shared / "data" / "text" / "tinystories.txt"])
    for name, context, stride, most in ((pocket, 64, 48, 500), (str(stories), 300, 200, 299)):
        quality = measure(
            replace(reference_config(name, config()), backend="cpu", load_format="auto"),
            texts,
            context=context,
            stride=stride,
            max_tokens=most,
        )
        path = resolve_model(name)
        tokenizer = Tokenizer.load(path)
        ids = tokenizer.encode(texts[0].text[:9000])[
            : most + 1
        ]  # the first is the begin token, or unpredicted
        assert quality.bos == (name != pocket)
        nats = transformers_nats(path, ids, context, stride)
        assert quality.total is not None and quality.total.tokens == most == len(nats)
        assert quality.total.loss == pytest.approx(sum(nats) / most, abs=1e-6)
        assert quality.total.perplexity == pytest.approx(math.exp(sum(nats) / most), rel=1e-5)
