"""Questions from JSONL: scored as their definition says, and refused where they cannot be read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gossamer.checkpoint.hub import resolve_model
from gossamer.checkpoint.tokenizer import Tokenizer
from gossamer.config import EngineConfig
from gossamer.errors import ConfigError
from gossamer.llm import LLM, SamplingParams
from gossamer.quality.greedy import Prompt, continue_greedily
from gossamer.quality.scorer import ModelScorer, open_scorer
from gossamer.quality.tasks import TaskFile, normalised, read_tasks, run_tasks
from gossamer.runtime.reference import ReferenceExecutor

POCKET = "gossamer/pocket"


@pytest.fixture(scope="module")
def scorer() -> Iterator[ModelScorer]:
    found = open_scorer(EngineConfig(model=POCKET, kv_dtype="f32"), 128)
    yield found
    found.close()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(resolve_model(POCKET))


def write(tmp_path: Path, *lines: Any) -> TaskFile:
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return read_tasks(path)


QUESTION = {"context": "He shut the", "choices": ["door", "of"], "answer": 0}


@pytest.mark.parametrize(
    "line, said",
    [
        ("{", "line 2 is not JSON"),
        ("[]", "line 2 is a JSON list"),
        ('{"prompt": "\\ud83d", "answer": "a"}', "line 2 is not JSON .*surrogates"),
        ({"answer": 0}, 'neither "choices" and "prompt"'),
        (QUESTION | {"prompt": "a"}, 'both "choices" and "prompt"'),
        (QUESTION | {"question": "a"}, 'both "context" and "question"'),
        ({"choices": ["a", "b"], "answer": 0}, 'neither "context" and "question"'),
        (QUESTION | {"choices": ["a"]}, '"choices" is .* 2 or more texts'),
        (QUESTION | {"choices": ["a", ""]}, '"choices" is'),
        (QUESTION | {"answer": 2}, '"answer" is 2; the number of a choice, 0 to 1'),
        (QUESTION | {"answer": "window"}, "\"answer\" is 'window'"),
        (QUESTION | {"answer": True}, '"answer" is True'),
        (QUESTION | {"context": 5}, '"context" is 5'),
        (QUESTION | {"anwser": 0}, "unknown field 'anwser'"),
        ({"prompt": "a"}, '"answer" is missing'),
        ({"prompt": "", "answer": "a"}, '"prompt" is'),
        ({"prompt": "a", "answer": ["a", "!!"]}, "'!!' is empty once it is normalised"),
        ({"prompt": "a", "answer": "b", "max_tokens": 0}, '"max_tokens" is 0'),
        ({"prompt": "a", "answer": "b", "stop": "\n"}, '"stop" is'),
    ],
)
def test_a_line_that_is_wrong_is_named(tmp_path: Path, line: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=f"t.jsonl, line 2.*{said}|t.jsonl, {said}"):
        write(tmp_path, QUESTION, line)


def test_only_line_feeds_end_a_line(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    prompt = "one\u2028two\x85three"
    path.write_text(json.dumps({"prompt": prompt, "answer": "a"}, ensure_ascii=False) + "\r\n\n", "utf-8")
    (task,) = read_tasks(path).exact
    assert task.prompt == prompt


def test_files_without_tasks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="are empty"):
        write(tmp_path, "", " ")
    with pytest.raises(ConfigError, match="cannot read the tasks"):
        read_tasks(tmp_path / "none")


def test_choices_are_scored_by_their_log_probabilities(
    tmp_path: Path, scorer: ModelScorer, tokenizer: Tokenizer
) -> None:
    """Held against the reference on every choice by itself; right answers are chosen so that the two ways of
    counting differ."""
    asked = {
        "It was a": ["man", "of", "great deal of trouble, and I am sure that he would have been"],
        "She was a very good": ["woman", "x"],
        "\n": ["Chapter", " Once upon"],
    }
    executor = open_scorer(EngineConfig(model=POCKET, kv_dtype="f32", backend="reference"), 128).executor
    assert isinstance(executor, ReferenceExecutor)
    sums, sizes = [], []
    for context, choices in asked.items():
        for choice in choices:
            text = context + ("" if choice.startswith(" ") or context == "\n" else " ") + choice
            ids = torch.tensor(tokenizer.encode(text))
            with torch.no_grad():
                logs = executor.model.logits(ids[None])[0].log_softmax(-1)
            count = len(ids) - len(tokenizer.encode(context))
            sums.append(float(logs[-count - 1 : -1].gather(1, ids[-count:, None]).sum()))
            sizes.append(len(choice.encode()))
    best, best_by_length = [], []
    for at, choices in zip((0, 3, 5), asked.values()):
        own = np.array(sums[at : at + len(choices)])
        best.append(int(own.argmax()))
        best_by_length.append(int((own / sizes[at : at + len(choices)]).argmax()))
    assert best[0] == 0 and best_by_length[0] == 2, sums  # a long choice loses by its sum alone
    for right in (best, best_by_length):
        lines = [{"question": c, "choices": o, "answer": a} for (c, o), a in zip(asked.items(), right)]
        (found,) = run_tasks(write(tmp_path, *lines), scorer, tokenizer)
        assert (found.kind, found.count) == ("multiple choice", 3)
        assert found.accuracy == pytest.approx(np.mean(np.equal(best, right)))
        assert found.normalised == pytest.approx(np.mean(np.equal(best_by_length, right)))
        assert found.chance == pytest.approx((1 / 3 + 1 / 2 + 1 / 2) / 3)


def test_continuations_are_the_engines(scorer: ModelScorer, tokenizer: Tokenizer) -> None:
    """Prompts shorter and longer than a step's tokens, more of them than there are pages for."""
    texts = ["Once", "It was a dark night and", "The old man said: " * 12] * 9
    ids = [tokenizer.encode(text) for text in texts]
    llm = LLM(POCKET, dtype="float32", kv_cache_dtype="float32", max_model_len=128)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    expected = [out.outputs[0].token_ids for out in llm.generate(ids, params, use_tqdm=False)]
    seen: list[int] = []
    prompts = [Prompt(i, 20) for i in ids]
    found = continue_greedily(scorer.executor, prompts, frozenset(), lambda done, total: seen.append(done))
    assert found == expected and seen == list(range(1, 28))
    end = expected[1][4]
    stopped = continue_greedily(scorer.executor, prompts[1:2], frozenset({end}))
    assert stopped == [expected[1][: expected[1].index(end)]]


def test_answers_are_matched_normalised(tmp_path: Path, scorer: ModelScorer, tokenizer: Tokenizer) -> None:
    prompt = "It was a dark night and"
    (ids,) = continue_greedily(scorer.executor, [Prompt(tokenizer.encode(prompt), 12)], frozenset())
    said = tokenizer.decode(ids)
    words = said.split()
    task = {"prompt": prompt, "max_tokens": 12, "stop": ["\n\n\n"]}
    lines = [
        task | {"answer": said.upper() + "!"},
        task | {"answer": ["no", f" the  {said}"]},
        task | {"answer": words[0]},
        task | {"answer": words[0], "stop": [words[1]]},
    ]
    (found,) = run_tasks(write(tmp_path, *lines), scorer, tokenizer)
    assert found.accuracy == 0.75 and found.normalised is None and found.kind == "exact match"
    assert normalised("  The cat's an  Animal.\n") == "cat s animal"
    assert normalised("(A)") == "a"


def test_tasks_beyond_the_context_are_named(
    tmp_path: Path, scorer: ModelScorer, tokenizer: Tokenizer
) -> None:
    long = "word " * 200
    for line in (QUESTION | {"context": long}, {"prompt": long, "answer": "a"}):
        with pytest.raises(ConfigError, match=r"line 1: .* the context holds 128"):
            run_tasks(write(tmp_path, line), scorer, tokenizer)
