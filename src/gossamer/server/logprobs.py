"""Log-probabilities in OpenAI's two formats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gossamer.checkpoint.detokenize import IncrementalDetokenizer
from gossamer.checkpoint.tokenizer import Tokenizer
from gossamer.engine.request import TokenLogprob

__all__ = ["CompletionLogprobs", "chat_logprobs", "prompt_logprobs"]

_LOWEST = -9999.0  # JSON has no -Infinity; vLLM's number for it


def chat_logprobs(tokenizer: Tokenizer | None, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Chat's: {"content": [{token, logprob, bytes, top_logprobs}]}."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text, data = _spell(tokenizer, token)
        return {"token": text, "logprob": max(logprob, _LOWEST), "bytes": data}

    content = [
        entry(each.token, each.logprob) | {"top_logprobs": [entry(*top) for top in each.top]}
        for each in logprobs
    ]
    return {"content": content, "refusal": None}


def prompt_logprobs(
    tokenizer: Tokenizer | None, scores: Sequence[TokenLogprob | None]
) -> list[dict[str, Any] | None]:
    """vLLM's prompt_logprobs: per token {id: {logprob, decoded_token}} of it and the likeliest."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {"logprob": max(logprob, _LOWEST), "decoded_token": _spell(tokenizer, token)[0]}

    return [
        None
        if each is None
        else {str(token): entry(token, value) for token, value in ((each.token, each.logprob), *each.top)}
        for each in scores
    ]


class CompletionLogprobs:
    """Completions': parallel lists, where text_offset counts characters from the start of the output.

    Makes one output's parts as its tokens come.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, prompt_ids: Sequence[int], skip_special_tokens: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._text = (
            None if tokenizer is None else IncrementalDetokenizer(tokenizer, prompt_ids, skip_special_tokens)
        )
        self._offset = 0

    def part(self, logprobs: Sequence[TokenLogprob]) -> dict[str, list[Any]]:
        """The lists for the next tokens."""
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        part: dict[str, list[Any]] = {name: [] for name in names}
        for each in logprobs:
            part["tokens"].append(self._name(each.token))
            part["token_logprobs"].append(max(each.logprob, _LOWEST))
            top = {self._name(token): max(value, _LOWEST) for token, value in reversed(each.top)}
            top.setdefault(self._name(each.token), max(each.logprob, _LOWEST))
            part["top_logprobs"].append(dict(sorted(top.items(), key=lambda pair: -pair[1])))
            part["text_offset"].append(self._offset)
            if self._text is not None:
                self._offset += len(self._text.push(each.token))
        return part

    def prompt_part(self, ids: Sequence[int], scores: Sequence[TokenLogprob | None]) -> dict[str, list[Any]]:
        """The lists for a prompt, whose first token has no log-probability."""
        part = self.part([TokenLogprob(ids[0], 0.0), *(each for each in scores if each is not None)])
        part["token_logprobs"][0] = part["top_logprobs"][0] = None
        return part

    def _name(self, token: int) -> str:
        """A token's text; "bytes:\\xf0\\x9f" for a part of a character, as OpenAI writes it, so that such
        tokens stay apart as keys."""
        text, data = _spell(self._tokenizer, token)
        if data is None or text.encode("utf-8", "replace") == bytes(data):
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _spell(tokenizer: Tokenizer | None, token: int) -> tuple[str, list[int] | None]:
    if tokenizer is None:
        return f"token_id:{token}", None
    return tokenizer.token_text(token), list(tokenizer.token_bytes(token))
