"""A target and its head on the CPU: drafts are, bit for bit, what the definition of the head gives."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gossamer.backends.cpu.program import CpuProgram, StepShape
from gossamer.checkpoint.weights import DummySource
from gossamer.config import ContinuousBatching, EngineConfig, SpeculativeDecoding
from gossamer.engine.engine import Engine
from gossamer.engine.request import SamplingParams
from gossamer.engine.speculative_decoding.draft import Draft
from gossamer.engine.speculative_decoding.heads import EagleHead
from gossamer.engine.step import HeadExecutor, Span, StepPlan
from gossamer.errors import CheckpointError, ConfigError, GraphError
from gossamer.graph.families.eagle import FEATURES, HIDDEN, build_eagle, with_features
from gossamer.graph.ir import Graph
from gossamer.passes.pipeline import run_passes
from gossamer.runtime.headed import HeadedExecutor
from gossamer.runtime.start import start
from tests.engine.serving import Client, request
from tests.engine.speculative_decoding.fakes import Seq
from tests.graph.small import llama, llama_config

LENGTH = 64


def compiled(graph: Graph) -> CpuProgram:
    shape = StepShape(tokens=40, rows=16, spans=4, page_size=16, pages=16, table=4, kv_dtype="f32")
    graph = run_passes(graph, EngineConfig(model="small"))[0]
    source = DummySource(graph)
    return CpuProgram(graph, source, shape, isa="scalar", threads=1, unit_rows=8)


@pytest.fixture
def executor() -> HeadedExecutor:
    return HeadedExecutor(compiled(with_features(llama())), LENGTH, head=compiled(build_eagle(llama())))


class Requests:
    """Sequences on a target, each on four pages of its own."""

    def __init__(self, executor: HeadedExecutor, prompts: dict[int, tuple[int, ...]], params: SamplingParams):
        self.executor, self.accepted = executor, 0
        self.seqs = [Seq(id, prompt, pending=len(prompt), params=params) for id, prompt in prompts.items()]

    def step(self, chunk: int) -> None:
        """A step of the target: a chunk of each prompt, or the next token and what is right of its draft."""
        spans = []
        for seq in self.seqs:
            draft = [] if seq.draft is None else seq.draft.tokens
            start = seq.computed
            stop = min(start + chunk, seq.length)
            rows = range(stop - start - 1, stop - start + len(draft)) if stop == seq.length else ()
            table = ([4 * seq.id + page for page in range(4)],)
            tokens = [*seq.tokens(start, stop), *(draft if rows else ())]
            spans.append(Span(seq.id, tokens, start, rows, table, seq.sampling if rows else None))
        result = self.executor.collect(self.executor.submit(StepPlan(tuple(spans))))
        for seq, span, rows in zip(self.seqs, spans, result.rows, strict=True):
            seq.pending -= len(span.tokens) if not rows else len(span.tokens) - len(rows) + 1
            for i, row in enumerate(rows):
                if i and seq.output_ids[-1] != span.tokens[len(span.tokens) - len(rows) + i]:
                    break
                self.accepted += bool(i)
                seq.output_ids.append(row.token)
            if rows:
                seq.pending = 1
            seq.draft = None


def definition(program: CpuProgram, target: CpuProgram, seq: Seq, length: int) -> list[int]:
    """The chain a head draws after a sequence, everything computed anew in single steps."""

    def run(made: CpuProgram, ids: list[int]) -> None:
        made.ids[: len(ids)], made.positions[: len(ids)] = ids, np.arange(len(ids))
        made.rows[0], made.spans[0], made.tables[:4] = len(ids) - 1, (0, len(ids), 0, 0, -1), range(4)
        made.run(len(ids), 1, 1, 4, sample=False)

    text = seq.tokens(0, seq.length)
    run(target, text)
    features = np.zeros((len(text) + length, 48), np.float32)
    features[1 : len(text)] = target.value(HIDDEN, len(text))[:-1]
    draft: list[int] = []
    for i in range(length):
        count = len(text) + i
        program.input(FEATURES, count)[...] = features[:count]
        run(program, [*text, *draft])
        features[count] = program.value(HIDDEN, count)[-1]
        draft.append(chosen(program.value("logits", 1)[0], seq, i))
    return draft


def chosen(logits: np.ndarray, seq: Seq, ahead: int) -> int:
    from gossamer.graph.ops.sampling import sample_row

    index, temperature = len(seq.output_ids) + ahead, seq.params.temperature
    return sample_row(logits, temperature=temperature, seed=seq.id, output_index=index)[0]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("chunk", [5, 16])
def test_drafts_are_those_of_the_definition(executor: HeadedExecutor, temperature: float, chunk: int) -> None:
    prompts = {1: (3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5), 2: (2, 7, 1), 3: tuple(range(13))}
    params = SamplingParams(max_tokens=None, temperature=temperature)
    requests = Requests(executor, prompts, params)
    head = EagleHead(executor)
    target, own = compiled(with_features(llama())), compiled(build_eagle(llama()))
    drafts = 0
    for _ in range(7):
        requests.step(chunk)
        head.follow(requests.seqs)
        ready = [seq for seq in requests.seqs if seq.computed == seq.length - 1]
        wanted = [(seq, o.most) for i, seq in enumerate(ready) if (o := head.offer(seq, 2 + i)) is not None]
        for (seq, count), draft in zip(wanted, head.propose(wanted), strict=True):
            assert draft == Draft(definition(own, target, seq, count))
            seq.draft = draft
            drafts += 1
        head.check()
    assert drafts >= 12


def test_a_target_verifies_a_perfect_head_s_drafts(executor: HeadedExecutor) -> None:
    """A head that repeats the target is not to be had untrained; the target's own tokens as drafts are."""
    plain = Requests(executor, {1: (5, 6, 7)}, SamplingParams(max_tokens=None, temperature=0))
    for _ in range(6):
        plain.step(8)
    text = plain.seqs[0].output_ids
    drafted = Requests(executor, {2: (5, 6, 7)}, SamplingParams(max_tokens=None, temperature=0))
    drafted.step(8)
    drafted.seqs[0].draft = Draft(text[1:4])
    drafted.step(8)
    assert drafted.seqs[0].output_ids == text[:5] and drafted.accepted == 3


def test_features_that_are_not_there_are_refused(executor: HeadedExecutor) -> None:
    def plan(offsets: tuple[int, ...], **rest: Any) -> StepPlan:
        span = Span(1, (3,) * max(len(offsets), 1), 0, (), ([0, 1, 2, 3],), features=offsets)
        return StepPlan((span,), program="draft", **rest)

    for wrong, match in (((), "0 features for 1 tokens"), ((0,), "0 to 0 of the 0"), ((-2,), "-2 to -2")):
        with pytest.raises(GraphError, match=match):
            executor.submit(plan(wrong))
    executor.collect(executor.submit(StepPlan((Span(1, (3, 4, 5), 0, (), ([0, 1, 2, 3],)),))))
    assert executor.feature_slots(1) == range(3) and executor.feature_slots(2) == range(0)
    executor.collect(executor.submit(plan((-1, 0, 1, 2))))
    with pytest.raises(GraphError, match="0 to 3 of the 3 that the last step of 'target'"):
        executor.submit(plan((0, 3)))
    executor.collect(executor.submit(plan((3,), features="draft")))
    with pytest.raises(GraphError, match="1 to 1 of the 1 that the last step of 'draft'"):
        executor.submit(plan((1,), features="draft"))


def config_of(model: str, **changes: Any) -> EngineConfig:
    method = SpeculativeDecoding(method="eagle", num_speculative_tokens=3, adaptive=False)
    values: dict[str, Any] = {"max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 24}
    return EngineConfig(model=model, **{"speculative_decoding": method, **values, **changes})


def answers(config: EngineConfig, **params: Any) -> tuple[list[Any], Engine]:
    """Tokens and log-probabilities of prompts of several lengths, served together."""
    started = start(config)
    engine = Engine(
        started.executor,
        batching=ContinuousBatching(),
        max_num_seqs=4,
        speculation=config.speculative_decoding,
    )
    client = Client(engine)
    words = [262, 1103, 309, 290, 2184, 511, 13, 198, 464, 1468, 582, 4423, 262, 3420]
    for i, count in enumerate((1, 5, 14, 9, 2)):
        values = {"temperature": 0.7, "max_tokens": 20, "seed": i, "logprobs": 1, **params}
        client.engine.submit(request(str(i), words[:count], **values))
    client.run()
    engine.check()
    return [(got.tokens, got.logprobs) for _, got in sorted(client.got.items())], engine


@pytest.mark.parametrize("params", [{}, {"temperature": 0.0}, {"repetition_penalty": 1.3, "top_k": 20}])
def test_pocket_s_own_head_changes_no_bit_and_is_often_right(params: dict[str, Any]) -> None:
    config = config_of("gossamer/pocket")
    speculated, engine = answers(config, **params)
    assert speculated == answers(replace(config, speculative_decoding=None), **params)[0]
    stats = engine.stats()
    assert stats.drafted > 60 and stats.accepted > 0.25 * stats.drafted


def test_a_head_is_planned_and_shown_as_a_draft(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(llama_config()))
    config = config_of(str(tmp_path), load_format="dummy", quantization=None)
    started = start(config)
    plain = start(replace(config, speculative_decoding=None))
    assert isinstance(started.executor, HeadExecutor)
    assert not isinstance(plain.executor, HeadExecutor) and plain.memory.draft == 0
    assert started.memory.draft > 0 and started.memory.weights == plain.memory.weights
    limits = started.executor.draft_limits
    assert limits is not None and limits.max_tokens == started.executor.limits.max_tokens + 4
    assert any(line.node == "draft.token_part" for line in started.receipt())


def test_a_model_without_a_head_is_refused_with_what_to_do(shared: Path) -> None:
    with pytest.raises(ConfigError, match=r"stories260K has none in eagle/.*compress\.eagle"):
        start(config_of(str(shared / "models" / "stories260K")))
    other = SpeculativeDecoding(method="eagle", model=str(shared / "models" / "stories260K"))
    with pytest.raises(CheckpointError, match="a draft head is 'gossamer_eagle'"):
        start(config_of("gossamer/pocket", speculative_decoding=other))
