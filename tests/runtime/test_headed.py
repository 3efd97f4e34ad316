"""A target and its head on the CPU: drafts are, bit for bit, what the definition of the head gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gossamer.backends.cpu.program import CpuProgram, StepShape
from gossamer.checkpoint.weights import DummySource
from gossamer.config import EngineConfig
from gossamer.engine.request import SamplingParams
from gossamer.engine.speculative_decoding.draft import Draft
from gossamer.engine.speculative_decoding.heads import EagleHead
from gossamer.engine.step import Span, StepPlan
from gossamer.errors import GraphError
from gossamer.graph.families.eagle import FEATURES, HIDDEN, build_eagle, with_features
from gossamer.graph.ir import Graph
from gossamer.passes.pipeline import run_passes
from gossamer.runtime.headed import HeadedExecutor
from gossamer.runtime.local import LocalExecutor
from tests.engine.speculative_decoding.fakes import Seq
from tests.graph.small import llama

LENGTH = 64


def local(graph: Graph) -> LocalExecutor:
    shape = StepShape(tokens=40, rows=16, spans=4, page_size=16, pages=16, table=4, kv_dtype="f32")
    graph = run_passes(graph, EngineConfig(model="small"))[0]
    source = DummySource(graph)
    return LocalExecutor(CpuProgram(graph, source, shape, isa="scalar", threads=1, unit_rows=8), LENGTH)


@pytest.fixture
def executor() -> HeadedExecutor:
    return HeadedExecutor(local(with_features(llama())), local(build_eagle(llama())))


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
    target, own = local(with_features(llama())).program, local(build_eagle(llama())).program
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


def test_a_target_verifies_a_perfect_head_s_drafts() -> None:
    """A head that repeats the target is not to be had untrained; the target's own tokens as drafts are."""
    executor = HeadedExecutor(local(with_features(llama())), local(build_eagle(llama())))
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
