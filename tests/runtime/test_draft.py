"""A draft model beside the model: its own steps and pages, memory in one plan, and drafts that cannot be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gossamer.config import EngineConfig, Quantization, SpeculativeDecoding
from gossamer.engine.request import SamplingParams
from gossamer.engine.step import Executor, LastSampled, RowResult, Sampling, Span, StepPlan
from gossamer.errors import ConfigError, MemoryBudgetError
from gossamer.runtime import planning
from gossamer.runtime import start as starting
from gossamer.runtime.sizing import step_rows
from gossamer.runtime.start import start
from tests.graph.small import llama_config


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """A model and a smaller one of the same vocabulary."""
    for name, fields in (("target", {}), ("draft", {"num_hidden_layers": 1, "intermediate_size": 40})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(llama_config(**fields)))
    return tmp_path / "target", tmp_path / "draft"


def config(target: Path, draft: Path | None, **changes: Any) -> EngineConfig:
    speculative = None
    if draft is not None:
        speculative = SpeculativeDecoding(method="draft_model", model=str(draft))
    values: dict[str, Any] = {
        "load_format": "dummy", "max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 64,
    }  # fmt: skip
    return EngineConfig(model=str(target), speculative_decoding=speculative, **(values | changes))


def step(executor: Executor, program: Any, tokens: tuple[Any, ...], start: int) -> RowResult:
    limits = executor.limits if program == "target" else executor.draft_limits
    assert limits is not None
    sampling = Sampling(SamplingParams(temperature=0, logprobs=4), 0, (), ())
    pages = tuple([0, 1] for _ in limits.pages)
    span = Span(0, tokens, start, (len(tokens) - 1,), pages, sampling)
    return executor.collect(executor.submit(StepPlan((span,), program=program))).rows[0][0]


def test_a_draft_runs_as_it_would_alone(models: tuple[Path, Path]) -> None:
    """Steps of both in turn, over pages of the same numbers: neither sees the other's."""
    target, draft = models
    both = start(config(target, draft)).executor
    alone = {"target": start(config(target, None)).executor, "draft": start(config(draft, None)).executor}
    assert alone["target"].draft_limits is None
    assert both.draft_limits is not None
    assert both.draft_limits.pages == both.limits.pages
    assert both.draft_limits.max_model_len == both.limits.max_model_len
    tokens: dict[str, tuple[int, ...]] = {"target": tuple(range(20)), "draft": tuple(range(30, 50))}
    at = {"target": 0, "draft": 0}
    for program in ("target", "draft", "draft", "target", "draft", "target"):
        found = step(both, program, tokens[program], at[program])
        assert found == step(alone[program], "target", tokens[program], at[program])
        at[program] += len(tokens[program])
        tokens[program] = (found.token,)


def test_a_draft_is_named_by_its_newest_token(models: tuple[Path, Path]) -> None:
    """Several drafted tokens may be in flight: each step takes the one before it, whichever program's."""
    executor = start(config(*models)).executor
    first = step(executor, "target", (1, 2, 3), 0)
    step(executor, "draft", (1, 2, 3), 0)
    step(executor, "target", (1, 2, 3), 0)
    named = [step(executor, "draft", (LastSampled(0),), 3 + i) for i in range(3)]
    token = first.token
    for i, found in enumerate(named):
        known = step(executor, "draft", (token,), 3 + i)
        assert known == found
        token = known.token


def test_memory_is_one_plan(models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    target, draft = models
    monkeypatch.setattr(starting, "resting_bytes", lambda kind: 1000)
    monkeypatch.setattr(planning, "growth_bytes", lambda *_, **__: 500)
    started = start(config(target, draft))
    one, other = start(config(target, None)).memory, start(config(draft, None)).memory
    assert started.memory.draft > other.weights + other.kv
    assert started.memory.weights == one.weights
    assert started.memory.total == started.memory.draft + sum(
        (started.memory.weights, started.memory.kv, started.memory.arena, started.memory.workspace)
    )
    least = started.memory.total + 1500
    start(config(target, draft, memory_budget=least, kv_bytes=started.memory.kv))
    with pytest.raises(MemoryBudgetError, match="draft "):
        start(config(target, draft, memory_budget=least - 1, kv_bytes=started.memory.kv))
    with pytest.raises(MemoryBudgetError, match=f"the draft model {target}: "):
        start(config(draft, target, memory_budget=least // 2, kv_bytes=started.memory.kv))


def test_a_draft_has_the_format_that_was_said(models: tuple[Path, Path]) -> None:
    target, draft = models
    plain = start(config(target, draft)).memory
    speculative = SpeculativeDecoding(
        method="draft_model", model=str(draft), quantization=Quantization(format="int8")
    )
    started = start(replace(config(target, None), speculative_decoding=speculative))
    assert started.memory.draft < plain.draft and started.memory.weights == plain.weights
    step(started.executor, "draft", (1, 2), 0)
    kernels = {(line.node.startswith("draft."), line.kernel) for line in started.receipt() if line.calls}
    assert (True, "embed_int8") in kernels
    assert all(is_draft for is_draft, _ in kernels)


def test_drafts_that_cannot_be_are_refused(models: tuple[Path, Path]) -> None:
    target, draft = models
    (draft / "config.json").write_text(json.dumps(llama_config(vocab_size=100)))
    with pytest.raises(ConfigError, match="vocabularies of 100 and 101"):
        start(config(target, draft))
    (draft / "config.json").write_text(json.dumps(llama_config(max_position_embeddings=32)))
    with pytest.raises(ConfigError, match=r"32 positions.*--max-model-len 32"):
        start(config(target, draft))
    with pytest.raises(ConfigError, match="one model"):
        config(target, draft, backend="reference")


def test_tokenizers_are_compared_token_by_token(models: tuple[Path, Path]) -> None:
    """The same vocabulary in another order of files is the same; two tokens that changed places are not."""
    pytest.importorskip("tokenizers")
    from tokenizers import Tokenizer as Made
    from tokenizers.decoders import ByteLevel
    from tokenizers.models import WordLevel

    target, draft = models
    words = {f"w{i}": i for i in range(100)} | {"<unk>": 100}

    def save(directory: Path, words: dict[str, int], special: list[str], indent: bool) -> None:
        made = Made(WordLevel(words, unk_token="<unk>"))
        made.decoder = ByteLevel()
        made.add_special_tokens(special)
        made.save(str(directory / "tokenizer.json"), pretty=indent)

    save(target, words, ["<unk>"], False)
    save(draft, words, ["<unk>"], True)
    start(config(target, draft))
    save(draft, words | {"w3": 4, "w4": 3}, ["<unk>"], False)
    with pytest.raises(ConfigError, match="token 3 is b'w4' in the one, b'w3' in the other"):
        start(config(target, draft))
    save(draft, words, ["<unk>", "w7"], False)
    with pytest.raises(ConfigError, match=r"token 7 .*special in one of them alone"):
        start(config(target, draft))


@pytest.mark.parametrize(
    ("sequences", "tokens", "drafted", "vocab", "rows"),
    [
        (1, 512, 4, 128256, 16),
        (1, 8, 4, 128256, 8),
        (8, 512, 4, 128256, 40),
        (32, 512, 4, 128256, 130),
        (256, 512, 4, 128256, 320),
        (32, 64, 4, 100, 64),
    ],
)
def test_rows_of_a_step(sequences: int, tokens: int, drafted: int, vocab: int, rows: int) -> None:
    speculative = SpeculativeDecoding(method="ngram", num_speculative_tokens=drafted)
    found = EngineConfig(
        model="m", max_num_seqs=sequences, max_num_batched_tokens=tokens, speculative_decoding=speculative
    )
    assert step_rows(found, vocab) == rows
    assert step_rows(replace(found, speculative_decoding=None), vocab) == max(sequences, min(tokens, 16))
