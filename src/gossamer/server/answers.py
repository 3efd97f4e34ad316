"""Updates of the engine as OpenAI's objects, whole and in chunks."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from gossamer.checkpoint.tokenizer import Tokenizer
from gossamer.engine.request import TokenLogprob
from gossamer.server.errors import ApiError
from gossamer.server.logprobs import CompletionLogprobs, chat_logprobs, prompt_logprobs
from gossamer.server.schema import CompletionRequest
from gossamer.server.ticket import Event, Ticket
from gossamer.server.tools import Part, Tools, whole_message
from gossamer.text_engine import TextUpdate

__all__ = ["Answers", "ChatAnswers", "CompletionAnswers"]

_FAILURES = {
    "nan": "the model's output is not a number for this request",
    "empty": "no token was allowed",
    "executor": "the engine could not run this request",
}


@dataclass(slots=True)
class _Choice:
    """One output so far."""

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class Answers(ABC):
    """The outputs of one ticket. model: the name to show."""

    prefix: str
    whole_object: str
    chunk_object: str
    restraint = "structured_outputs"  # the parameter that a grammar came of

    def __init__(self, ticket: Ticket, model: str, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._created, self._model = int(time.time()), model
        self._prompt_tokens, self._completion_tokens = ticket.prompt_tokens, 0
        self._jobs = [at for at, job in enumerate(ticket.jobs) for _ in range(job.params.n)]
        self._choices = [_Choice() for _ in self._jobs]
        self._cached: dict[int, int] = {}  # job -> tokens of its prompt that the prefix cache had
        self._scores: dict[int, Sequence[TokenLogprob | None]] = {}  # job -> its prompt's log-probabilities
        self._wants_logprobs = ticket.jobs[0].params.logprobs is not None

    def add(self, event: Event) -> None:
        """Keeps an event for `whole`. Raises ApiError where the output failed."""
        index, update = event
        self._count(index, update)
        choice = self._choices[index]
        choice.text += update.text
        choice.logprobs += update.logprobs or ()
        choice.finish_reason, choice.stop_reason = update.finish_reason, update.stop_reason

    def whole(self) -> dict[str, Any]:
        """The object for a request that does not stream."""
        choices = [
            self._whole(index, choice) | {"index": index} | self._end(index, choice)
            for index, choice in enumerate(self._choices)
        ]
        return self._object(self.whole_object, self._chosen(choices)) | {"usage": self._usage()}

    def _chosen(self, choices: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The choices to show."""
        return choices

    def chunks(self, event: Event) -> Iterator[dict[str, Any]]:
        """What a stream says about an event. Raises ApiError where the output failed."""
        index, update = event
        self._count(index, update)
        for part, last in self._parts(index, update):
            choice = {"index": index} | part | (self._end(index, update) if last else {"finish_reason": None})
            yield self._object(self.chunk_object, [choice])

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk of a stream with include_usage."""
        return self._object(self.chunk_object, []) | {"usage": self._usage()}

    def _end(self, index: int, told: _Choice | TextUpdate) -> dict[str, Any]:
        """Why an output ended."""
        return {"finish_reason": told.finish_reason, "stop_reason": told.stop_reason}

    def _count(self, index: int, update: TextUpdate) -> None:
        if update.finish_reason == "error":
            why = str(update.stop_reason)
            if why not in _FAILURES:  # a grammar's own words
                raise ApiError(400, f"{self.restraint}: {why}", code="generation_failed")
            raise ApiError(500, _FAILURES[why], kind="server_error", code="generation_failed")
        self._completion_tokens += len(update.tokens)
        job = self._jobs[index]
        self._cached[job] = update.cached
        if update.prompt_logprobs is not None:
            self._scores[job] = update.prompt_logprobs

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def _usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": self._prompt_tokens + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())},
        }

    @abstractmethod
    def _whole(self, index: int, choice: _Choice) -> dict[str, Any]:
        """A finished choice, without index and reasons."""

    @abstractmethod
    def _parts(self, index: int, update: TextUpdate) -> Iterator[tuple[dict[str, Any], bool]]:
        """(a choice of a chunk, whether it tells the end) for an update; nothing where it says nothing."""


class CompletionAnswers(Answers):
    """/v1/completions. echo: what each prompt's outputs begin with."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(
        self,
        ticket: Ticket,
        model: str,
        tokenizer: Tokenizer | None,
        echo: list[str] | None,
        body: CompletionRequest,
    ) -> None:
        super().__init__(ticket, model, tokenizer)
        self._body = body
        self._prompts = [job.prompt_ids for job in ticket.jobs]
        self._echo = [""] * len(self._jobs) if echo is None else [echo[job] for job in self._jobs]
        self._wants_logprobs = body.logprobs is not None
        skip = ticket.jobs[0].params.skip_special_tokens
        self._logprobs = [
            CompletionLogprobs(tokenizer, () if body.scored else self._prompts[job], skip)
            for job in self._jobs
        ]

    def _count(self, index: int, update: TextUpdate) -> None:
        if self._body.max_tokens == 0 and update.finish_reason != "error":
            update.text, update.tokens, update.logprobs, update.stop_reason = "", [], None, None
            update.finish_reason = update.finish_reason and "length"
        super()._count(index, update)

    def _whole(self, index: int, choice: _Choice) -> dict[str, Any]:
        whole: dict[str, Any] = {"text": self._echo[index] + choice.text, "logprobs": None}
        if self._wants_logprobs:
            whole["logprobs"] = self._lists(index, choice.logprobs, first=True)
        if self._body.prompt_logprobs is not None:
            scores = self._scores.get(self._jobs[index], ())
            whole["prompt_logprobs"] = prompt_logprobs(self._tokenizer, scores)
        return whole

    def _chosen(self, choices: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Of best_of outputs of a prompt the n with the highest mean log-probability, the best first."""
        n, made = self._body.n or 1, self._body.best_of or 0
        if made <= n:
            return choices

        def rank(index: int) -> float:
            values = [each.logprob for each in self._choices[index].logprobs]
            return -sum(values) / len(values) if values else 0.0

        groups = (range(first, first + made) for first in range(0, len(choices), made))
        kept = [choices[index] for group in groups for index in sorted(group, key=rank)[:n]]
        return [choice | {"index": index} for index, choice in enumerate(kept)]

    def _parts(self, index: int, update: TextUpdate) -> Iterator[tuple[dict[str, Any], bool]]:
        scored = self._body.scored and update.prompt_logprobs is not None
        text, self._echo[index] = self._echo[index] + update.text, ""
        logprobs = None
        if self._wants_logprobs:
            logprobs = self._lists(index, update.logprobs or (), first=scored)
        ends = update.finish_reason is not None
        if text or update.logprobs or ends:
            yield {"text": text, "logprobs": logprobs}, ends

    def _lists(self, index: int, logprobs: Sequence[TokenLogprob], *, first: bool) -> dict[str, list[Any]]:
        """An output's next log-probabilities; first: after those of the prompt, if it is shown."""
        job, lists = self._jobs[index], self._logprobs[index]
        if not (first and self._body.scored and job in self._scores):
            return lists.part(logprobs)
        before = lists.prompt_part(self._prompts[job], self._scores[job])
        after = lists.part(logprobs)
        return {name: before[name] + after[name] for name in after}


class ChatAnswers(Answers):
    """/v1/chat/completions. tools: what may be called."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(
        self, ticket: Ticket, model: str, tokenizer: Tokenizer | None, tools: Tools | None = None
    ) -> None:
        super().__init__(ticket, model, tokenizer)
        self._readers = None if tools is None else [tools.reader() for _ in self._choices]
        if tools is not None:
            self.restraint = "tools"
        self._wants_scores = ticket.jobs[0].params.prompt_logprobs is not None
        self._begun: set[int] = set()

    def whole(self) -> dict[str, Any]:
        """The object for a request that does not stream."""
        if not self._wants_scores:
            return super().whole()
        return super().whole() | {
            "prompt_logprobs": prompt_logprobs(self._tokenizer, self._scores.get(0, ()))
        }

    def _whole(self, index: int, choice: _Choice) -> dict[str, Any]:
        logprobs = chat_logprobs(self._tokenizer, choice.logprobs) if self._wants_logprobs else None
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        if self._readers is not None:
            reader = self._readers[index]
            message["content"], calls = whole_message(reader.push(choice.text) + reader.finish())
            if calls:
                message["tool_calls"] = calls
        return {"message": message, "logprobs": logprobs}

    def _end(self, index: int, told: _Choice | TextUpdate) -> dict[str, Any]:
        end = super()._end(index, told)
        if self._readers is not None:
            end["finish_reason"] = self._readers[index].reason(told.finish_reason)
        return end

    def _parts(self, index: int, update: TextUpdate) -> Iterator[tuple[dict[str, Any], bool]]:
        if index not in self._begun:
            self._begun.add(index)
            yield {"delta": {"role": "assistant", "content": ""}, "logprobs": None}, False
        ends = update.finish_reason is not None
        deltas = self._deltas(index, update.text, ends)
        if deltas or update.logprobs:
            logprobs = chat_logprobs(self._tokenizer, update.logprobs or ()) if self._wants_logprobs else None
            for at, delta in enumerate(deltas or [{"content": ""}]):
                yield {"delta": delta, "logprobs": None if at else logprobs}, False
        if ends:
            yield {"delta": {}, "logprobs": None}, True

    def _deltas(self, index: int, text: str, ends: bool) -> list[dict[str, Any]]:
        """What new text brings a message; where nothing but log-probabilities is new, nothing."""
        if self._readers is None:
            return [{"content": text}] if text else []
        reader = self._readers[index]
        parts: list[Part] = reader.push(text)
        if ends:
            parts += reader.finish()
        return [{"content": part} if isinstance(part, str) else {"tool_calls": [part]} for part in parts]
