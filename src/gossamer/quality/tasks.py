"""Tasks from JSONL: multiple choice by log-probability, and exact match of a greedy continuation.

A line is an object of one of two kinds:

    {"context": "The sky is", "choices": ["blue", "made of cheese"], "answer": 0}
    {"prompt": "2 + 2 =", "answer": "4"}

Multiple choice: "question" may stand for "context"; "answer" is the number of the right choice, from 0, or
its text. A choice follows the context after a space, unless either brings white space along; its score is
the sum of its tokens' log-probabilities, and normalised that sum by its bytes of UTF-8 (as EleutherAI's
evaluation harness counts accuracy and normalised accuracy).

Exact match: "answer" is a text or a list of texts that are right. The model continues the prompt greedily up
to "stop" (texts; the end of a line if not given) or "max_tokens" (64); both sides are then lower-cased, and
punctuation, articles and surplus white space taken out (as Rajpurkar et al., SQuAD, 2016, compare answers).
"""

from __future__ import annotations

import json
import math
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gossamer.checkpoint.tokenizer import Tokenizer
from gossamer.errors import ConfigError
from gossamer.quality.compare import score
from gossamer.quality.greedy import Prompt, continue_greedily
from gossamer.quality.report import TaskScore
from gossamer.quality.scorer import ModelScorer
from gossamer.quality.windows import Window

__all__ = ["ExactMatch", "MultipleChoice", "TaskFile", "normalised", "read_tasks", "run_tasks"]

Progress = Callable[[str, int, int], None]
_FIELDS = {
    "choices": {"context", "question", "choices", "answer"},
    "prompt": {"prompt", "answer", "stop", "max_tokens"},
}
_MAX_TOKENS = 64
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation, " "))


@dataclass(frozen=True, slots=True, kw_only=True)
class MultipleChoice:
    """A question, the texts to choose from, and the place of the right one; line: of the file."""

    line: int
    context: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactMatch:
    """A prompt, the answers that are right, and where the model's ends."""

    line: int
    prompt: str
    answers: tuple[str, ...]
    stop: tuple[str, ...] = ("\n",)
    max_tokens: int = _MAX_TOKENS


@dataclass(frozen=True, slots=True)
class TaskFile:
    """A file's tasks, of both kinds."""

    name: str
    choices: tuple[MultipleChoice, ...]
    exact: tuple[ExactMatch, ...]


def read_tasks(path: Path) -> TaskFile:
    """The tasks of a file. Raises ConfigError with the line and the field that is wrong."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines cuts inside of texts, too
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the tasks {path}: {error}") from None
    choices: list[MultipleChoice] = []
    exact: list[ExactMatch] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            reader = _Line(path.name, number, line)
            if reader.kind == "choices":
                choices.append(reader.multiple_choice())
            else:
                exact.append(reader.exact_match())
    if not choices and not exact:
        raise ConfigError(f"the tasks {path} are empty; write one JSON object a line")
    return TaskFile(path.name, tuple(choices), tuple(exact))


def run_tasks(
    tasks: TaskFile,
    scorer: ModelScorer,
    tokenizer: Tokenizer,
    progress: Progress = lambda what, done, total: None,
) -> list[TaskScore]:
    """The scores of a file, one for each kind of task in it. Raises ConfigError, with the line, for a task
    that is longer than the context."""
    out = []
    if tasks.choices:
        out.append(_run_choices(tasks, scorer, tokenizer, progress))
    if tasks.exact:
        out.append(_run_exact(tasks, scorer, tokenizer, progress))
    return out


def normalised(text: str) -> str:
    """An answer without case, punctuation, articles and surplus white space; one of articles alone (the
    letter A, perhaps) keeps them."""
    words = text.casefold().translate(_PUNCTUATION).split()
    return " ".join([word for word in words if word not in _ARTICLES] or words)


def _run_choices(tasks: TaskFile, scorer: ModelScorer, tokenizer: Tokenizer, progress: Progress) -> TaskScore:
    windows, sizes = [], []
    for task in tasks.choices:
        for choice in task.choices:
            windows.append(_window(task, choice, tasks.name, scorer.context, tokenizer))
            sizes.append(len(choice.encode()))
    losses = score(scorer, windows, lambda done, total: progress(tasks.name, done, total))
    sums = np.bincount(losses.windows, losses.nats, minlength=len(windows))
    by_length = sums / np.maximum(sizes, 1)
    right, right_by_length, at = [], [], 0
    for task in tasks.choices:
        own = slice(at, at + len(task.choices))
        right.append(int(sums[own].argmin()) == task.answer)
        right_by_length.append(int(by_length[own].argmin()) == task.answer)
        at = own.stop
    chance = float(np.mean([1 / len(task.choices) for task in tasks.choices]))
    return _score(tasks.name, "multiple choice", right, chance, float(np.mean(right_by_length)))


def _window(task: MultipleChoice, choice: str, file: str, context: int, tokenizer: Tokenizer) -> Window:
    """The tokens of context and choice, of which those that the context does not fix are predicted."""
    space = "" if task.context[-1:].isspace() or choice[:1].isspace() or not task.context else " "
    whole = tokenizer.encode(task.context + space + choice)
    before = tokenizer.encode(task.context)
    fixed = next((i for i, (a, b) in enumerate(zip(whole, before)) if a != b), min(len(whole), len(before)))
    if len(whole) > context:
        raise ConfigError(
            f"{file}, line {task.line}: {len(whole)} tokens with the choice {choice[:40]!r}, and the context "
            f"holds {context}; shorten it, or raise --context"
        )
    fixed = min(max(fixed, 1), len(whole) - 1)  # without a begin token nothing predicts the first
    return Window(np.asarray(whole[:-1], np.int32), np.asarray(whole[fixed:], np.int32))


def _run_exact(tasks: TaskFile, scorer: ModelScorer, tokenizer: Tokenizer, progress: Progress) -> TaskScore:
    prompts = []
    for task in tasks.exact:
        ids = tokenizer.encode(task.prompt)
        if len(ids) + task.max_tokens > scorer.context:
            raise ConfigError(
                f"{tasks.name}, line {task.line}: {len(ids)} tokens of prompt and {task.max_tokens} of "
                f"answer, and the context holds {scorer.context}; lower max_tokens, or raise --context"
            )

        def ended(found: Sequence[int], task: ExactMatch = task) -> bool:
            return _cut(tokenizer.decode(found), task.stop)[1]

        prompts.append(Prompt(ids, task.max_tokens, ended))
    found = continue_greedily(
        scorer.executor,
        prompts,
        frozenset(tokenizer.eos_ids),
        lambda done, total: progress(tasks.name, done, total),
    )
    right = [
        normalised(_cut(tokenizer.decode(ids), task.stop)[0]) in map(normalised, task.answers)
        for task, ids in zip(tasks.exact, found, strict=True)
    ]
    return _score(tasks.name, "exact match", right, 0.0, None)


def _cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text up to the first stop, white space before it aside, and whether there was one."""
    text = text.lstrip()
    ends = [at for stop in stops if (at := text.find(stop)) >= 0]
    return (text[: min(ends)], True) if ends else (text, False)


def _score(name: str, kind: str, right: list[bool], chance: float, by_length: float | None) -> TaskScore:
    share, count = float(np.mean(right)), len(right)
    return TaskScore(
        name=name,
        kind=kind,
        count=count,
        accuracy=share,
        normalised=by_length,
        chance=chance,
        error=math.sqrt(share * (1 - share) / max(count - 1, 1)),
    )


class _Line:
    """One line of a file, and its fields as they must be."""

    def __init__(self, file: str, number: int, text: str) -> None:
        self._where, self._number = f"{file}, line {number}", number
        try:
            raw = json.loads(text)
            json.dumps(raw, ensure_ascii=False).encode()  # half a surrogate pair is no text
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{self._where} is not JSON ({error}); write one object a line") from None
        if not isinstance(raw, dict):
            raise ConfigError(f"{self._where} is a JSON {type(raw).__name__}; an object is needed")
        self._raw: dict[str, Any] = raw
        kinds = [kind for kind in _FIELDS if kind in raw]
        if len(kinds) != 1:
            raise ConfigError(
                f'{self._where} has {"both" if kinds else "neither"} "choices" and "prompt"; multiple choice '
                'has "context", "choices" and "answer", exact match "prompt" and "answer"'
            )
        self.kind = kinds[0]
        if unknown := sorted(raw.keys() - _FIELDS[self.kind]):
            known = ", ".join(sorted(_FIELDS[self.kind]))
            raise ConfigError(f"{self._where} has an unknown field {unknown[0]!r}; there are {known}")

    def multiple_choice(self) -> MultipleChoice:
        names = [name for name in ("context", "question") if name in self._raw]
        if len(names) != 1:
            raise ConfigError(
                f'{self._where} has {"both" if names else "neither"} "context" and "question"; give one'
            )
        choices = self._texts("choices", 2)
        answer = self._raw.get("answer")
        if isinstance(answer, str) and answer in choices:
            answer = choices.index(answer)
        if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
            raise self._wrong(
                "answer", f"the number of a choice, 0 to {len(choices) - 1}, or its text is right"
            )
        return MultipleChoice(line=self._number, context=self._text(names[0]), choices=choices, answer=answer)

    def exact_match(self) -> ExactMatch:
        most = self._raw.get("max_tokens", _MAX_TOKENS)
        if isinstance(most, bool) or not isinstance(most, int) or most < 1:
            raise self._wrong("max_tokens", "a whole number from 1 is right")
        single = isinstance(self._raw.get("answer"), str)
        answers = (self._text("answer"),) if single else self._texts("answer", 1)
        if empty := [a for a in answers if not normalised(a)]:
            raise ConfigError(f'{self._where}: "answer" {empty[0]!r} is empty once it is normalised')
        prompt = self._text("prompt")
        if not prompt:
            raise self._wrong("prompt", "a text of one character at least is right")
        stop = self._texts("stop", 1) if "stop" in self._raw else ("\n",)
        return ExactMatch(line=self._number, prompt=prompt, answers=answers, stop=stop, max_tokens=most)

    def _text(self, name: str) -> str:
        value = self._raw[name]
        if not isinstance(value, str):
            raise self._wrong(name, "a text is right")
        return value

    def _texts(self, name: str, least: int) -> tuple[str, ...]:
        value = self._raw.get(name)
        if (
            not isinstance(value, list)
            or len(value) < least
            or not all(isinstance(v, str) and v for v in value)
        ):
            raise self._wrong(name, f"a list of {least} or more texts is right")
        return tuple(value)

    def _wrong(self, name: str, right: str) -> ConfigError:
        given = repr(self._raw[name])[:60] if name in self._raw else "missing"
        return ConfigError(f'{self._where}: "{name}" is {given}; {right}')
