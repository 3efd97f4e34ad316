"""Updates of the engine as OpenAI's objects, whole and in chunks."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from gossamer.checkpoint.tokenizer import Tokenizer
from gossamer.engine.request import TokenLogprob
from gossamer.server.errors import ApiError
from gossamer.server.logprobs import CompletionLogprobs, chat_logprobs
from gossamer.server.ticket import Event, Ticket
from gossamer.text_engine import TextUpdate

__all__ = ["Answers", "ChatAnswers", "CompletionAnswers"]

_FAILURES = {
    "nan": "the model's output is not a number for this request",
    "empty": "no token was allowed",
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

    def __init__(self, ticket: Ticket, model: str, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._created, self._model = int(time.time()), model
        self._prompt_tokens, self._completion_tokens = ticket.prompt_tokens, 0
        self._choices = [_Choice() for job in ticket.jobs for _ in range(job.params.n)]
        self._wants_logprobs = ticket.jobs[0].params.logprobs is not None

    def add(self, event: Event) -> None:
        """Keeps an event for `whole`. Raises ApiError where the output failed."""
        index, update = event
        self._count(update)
        choice = self._choices[index]
        choice.text += update.text
        choice.logprobs += update.logprobs or ()
        choice.finish_reason, choice.stop_reason = update.finish_reason, update.stop_reason

    def whole(self) -> dict[str, Any]:
        """The object for a request that does not stream."""
        choices = [
            self._whole(index, choice)
            | {"index": index, "finish_reason": choice.finish_reason, "stop_reason": choice.stop_reason}
            for index, choice in enumerate(self._choices)
        ]
        return self._object(self.whole_object, choices) | {"usage": self._usage()}

    def chunks(self, event: Event) -> Iterator[dict[str, Any]]:
        """What a stream says about an event. Raises ApiError where the output failed."""
        index, update = event
        self._count(update)
        for part, last in self._parts(index, update):
            end = {"finish_reason": update.finish_reason, "stop_reason": update.stop_reason}
            choice = {"index": index} | part | (end if last else {"finish_reason": None})
            yield self._object(self.chunk_object, [choice])

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk of a stream with include_usage."""
        return self._object(self.chunk_object, []) | {"usage": self._usage()}

    def _count(self, update: TextUpdate) -> None:
        if update.finish_reason == "error":
            why = _FAILURES.get(str(update.stop_reason), "the engine could not run this request")
            raise ApiError(500, why, kind="server_error", code="generation_failed")
        self._completion_tokens += len(update.tokens)

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def _usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": self._prompt_tokens + self._completion_tokens,
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
        self, ticket: Ticket, model: str, tokenizer: Tokenizer | None, echo: list[str] | None = None
    ) -> None:
        super().__init__(ticket, model, tokenizer)
        jobs = [job for job in ticket.jobs for _ in range(job.params.n)]
        n = ticket.jobs[0].params.n
        self._echo = [""] * len(jobs) if echo is None else [text for text in echo for _ in range(n)]
        self._logprobs = [
            CompletionLogprobs(tokenizer, job.prompt_ids, job.params.skip_special_tokens) for job in jobs
        ]

    def _whole(self, index: int, choice: _Choice) -> dict[str, Any]:
        return {
            "text": self._echo[index] + choice.text,
            "logprobs": self._logprobs[index].part(choice.logprobs) if self._wants_logprobs else None,
        }

    def _parts(self, index: int, update: TextUpdate) -> Iterator[tuple[dict[str, Any], bool]]:
        text, self._echo[index] = self._echo[index] + update.text, ""
        logprobs = self._logprobs[index].part(update.logprobs or ()) if self._wants_logprobs else None
        ends = update.finish_reason is not None
        if text or update.logprobs or ends:
            yield {"text": text, "logprobs": logprobs}, ends


class ChatAnswers(Answers):
    """/v1/chat/completions."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, ticket: Ticket, model: str, tokenizer: Tokenizer | None) -> None:
        super().__init__(ticket, model, tokenizer)
        self._begun: set[int] = set()

    def _whole(self, index: int, choice: _Choice) -> dict[str, Any]:
        logprobs = chat_logprobs(self._tokenizer, choice.logprobs) if self._wants_logprobs else None
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return {"message": message, "logprobs": logprobs}

    def _parts(self, index: int, update: TextUpdate) -> Iterator[tuple[dict[str, Any], bool]]:
        if index not in self._begun:
            self._begun.add(index)
            yield {"delta": {"role": "assistant", "content": ""}, "logprobs": None}, False
        if update.text or update.logprobs:
            logprobs = chat_logprobs(self._tokenizer, update.logprobs or ()) if self._wants_logprobs else None
            yield {"delta": {"content": update.text}, "logprobs": logprobs}, False
        if update.finish_reason is not None:
            yield {"delta": {}, "logprobs": None}, True
