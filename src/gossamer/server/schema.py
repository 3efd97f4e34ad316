"""The requests that clients may send. What is not built yet is refused by name, never ignored."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

from gossamer.engine.request import MAX_LOGPROBS, MAX_N, SamplingParams
from gossamer.errors import RequestError, ToolTemplateError
from gossamer.server.errors import ApiError
from gossamer.server.tools import Tools, called_before, read_tools
from gossamer.text_engine import TextEngine

__all__ = ["ChatRequest", "CompletionRequest", "DetokenizeRequest", "StreamOptions", "TokenizeRequest"]

# Parameters that would change the answer but do not exist here yet, with the values that ask for nothing.
_NOT_BUILT: dict[str, tuple[Any, ...]] = {
    "functions": ([],), "function_call": ("none", "auto"),
    "suffix": ("",), "audio": (), "modalities": (["text"],), "prediction": (), "store": (False,),
    "service_tier": ("auto", "default"), "reasoning_effort": (), "verbosity": (), "web_search_options": (),
    "use_beam_search": (False,), "length_penalty": (1,), "bad_words": ([],),
    "allowed_token_ids": (), "truncate_prompt_tokens": (), "logits_processors": ([],),
    "chat_template": (), "documents": ([],), "continue_final_message": (False,), "prompt_embeds": (),
    "kv_transfer_params": (), "mm_processor_kwargs": (), "return_token_ids": (False,),
}  # fmt: skip
# What vLLM called it once -> the key of structured_outputs, if it has one here.
_GUIDED = {
    "guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar",
    "guided_decoding_backend": None, "guided_whitespace_pattern": None,
}  # fmt: skip
_NO_LIMIT = 2**31 - 1  # the engine cuts it to the context


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_built(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name in sorted(data.keys() & _GUIDED.keys()):
            if data[name] is None:
                continue
            key = _GUIDED[name]
            new = "leave it out" if key is None else f'say structured_outputs: {{"{key}": ...}}'
            raise ApiError(400, f"{name} is gone; {new}", param=name, code="unsupported_parameter")
        for name in data:
            refused = name in _NOT_BUILT and name not in cls.model_fields
            if refused and data[name] is not None and data[name] not in _NOT_BUILT[name]:
                raise ApiError(
                    400, f"{name} is not built yet; leave it out", param=name, code="unsupported_parameter"
                )
        gone = (_NOT_BUILT.keys() | _GUIDED.keys()) - cls.model_fields.keys()
        return {k: v for k, v in data.items() if k not in gone}


class StreamOptions(_Body):
    """include_usage: one more chunk at the end says how many tokens there were."""

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class _Generation(_Body):
    """What completions and chat have in common. None means: the model's or OpenAI's default."""

    model: str | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: int | None = None
    """Lower runs first."""
    cache_salt: str | None = Field(default=None, max_length=1024)
    """Requests of another salt share no prefixes with this one."""
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    structured_outputs: dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None

    # Known to OpenAI's clients; they say something about the caller and nothing about the answer. Users share
    # the machine evenly.
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    _SAME: ClassVar = (
        "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
        "repetition_penalty", "seed", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos",
        "min_tokens", "skip_special_tokens", "prompt_logprobs",
    )  # fmt: skip

    @model_validator(mode="after")
    def _check_stream_options(self) -> _Generation:
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options is only for stream: true", param="stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise ApiError(400, "prompt_logprobs does not go with stream: true", param="prompt_logprobs")
        if self.structured_outputs is not None and self.response_format is not None:
            raise ApiError(
                400, "structured_outputs and response_format both say what the output looks like; give one",
                param="response_format",
            )  # fmt: skip
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def _params(self, engine: TextEngine, **own: Any) -> SamplingParams:
        wanted = self.structured_outputs if self.response_format is None else _format(self.response_format)
        given = {name: getattr(self, name) for name in self._SAME} | {"structured_outputs": wanted} | own
        if self.logit_bias is not None:
            given["logit_bias"] = _biases(self.logit_bias)
        try:
            return engine.default_params(**given)
        except RequestError as error:
            # Sampling parameters begin their message with the name of the one that is wrong.
            name = str(error).split(" ", 1)[0].rstrip(":")
            if name == "structured_outputs" and self.response_format is not None:
                name = "response_format"
            raise ApiError(400, str(error), param=name if name in type(self).model_fields else None) from None


class CompletionRequest(_Generation):
    """POST /v1/completions."""

    prompt: str | list[int] | list[str | list[int]]
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = None
    add_special_tokens: bool = True

    @field_validator("prompt", mode="before")
    @classmethod
    def _check_prompt(cls, value: Any) -> Any:
        for one in value if isinstance(value, list) and value and type(value[0]) is not int else [value]:
            ids = isinstance(one, list) and all(type(token) is int for token in one)
            if not ids and not isinstance(one, str):
                says = (
                    "prompt must be a string, a list of strings, a list of token ids or a list of such lists"
                )
                raise ApiError(400, says, param="prompt")
        return value

    @model_validator(mode="after")
    def _check(self) -> CompletionRequest:
        if self.scored and self.prompt_logprobs is not None:
            raise ApiError(
                400, "echo with logprobs brings those of the prompt already; leave prompt_logprobs out",
                param="prompt_logprobs",
            )  # fmt: skip
        if self.scored and self.stream and (self.n or 1) > 1:
            raise ApiError(400, "echo with logprobs streams one output only; n must be 1", param="n")
        if self.max_tokens == 0 and not self.echo:
            raise ApiError(400, "max_tokens 0 is only for echo: true; give 1 or more", param="max_tokens")
        if self.best_of is not None:
            if not (self.n or 1) <= self.best_of <= MAX_N:
                raise ApiError(
                    400, f"best_of {self.best_of} is not in n {self.n or 1} to {MAX_N}", param="best_of"
                )
            if self.stream and self.best_of > (self.n or 1):
                raise ApiError(
                    400, "best_of above n does not go with stream: true: the best is known at the end",
                    param="best_of",
                )  # fmt: skip
        return self

    @property
    def scored(self) -> bool:
        """Whether the prompt is shown with its log-probabilities."""
        return bool(self.echo) and self.logprobs is not None

    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one. Raises ApiError where there is none."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise ApiError(400, "prompt is an empty list; give at least one prompt", param="prompt")
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt

    def params(self, engine: TextEngine) -> SamplingParams:
        """How its tokens are chosen. Raises ApiError for a value out of range."""
        more: dict[str, Any] = {"logprobs": self.logprobs, "max_tokens": self.max_tokens}
        if self.scored:
            more["prompt_logprobs"] = self.logprobs
        if self.max_tokens == 0:  # the engine makes one; the answer leaves it out
            more["max_tokens"], more["min_tokens"] = 1, None
        if self.best_of is not None and self.best_of > (self.n or 1):
            more |= {"n": self.best_of, "logprobs": self.logprobs or 0}
        return self._params(engine, **more)


class _Message(BaseModel):
    """One message; fields that are not named here (name, tool_calls, ...) are the template's business."""

    model_config = ConfigDict(extra="allow", strict=True)
    role: str
    content: str | list[dict[str, Any]] | None = None


class _Conversation(_Body):
    messages: list[_Message]
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None

    _tools: Tools | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _read_tools(self) -> _Conversation:
        self._tools = self._chosen_tools()
        return self

    def _chosen_tools(self) -> Tools | None:
        return read_tools(self.tools, None, None)

    @field_validator("chat_template_kwargs")
    @classmethod
    def _check_variables(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        for name in (
            "messages",
            "tools",
            "need_tools",
            "documents",
            "add_generation_prompt",
            "chat_template",
        ):
            if name in (value or {}):
                raise ApiError(400, f"chat_template_kwargs may not set {name}", param="chat_template_kwargs")
        return value

    def conversation(self) -> list[dict[str, Any]]:
        """The messages as templates read them: content is text. Raises ApiError for what is not text."""
        out = []
        for at, message in enumerate(self.messages):
            plain = message.model_dump(exclude_unset=True)
            if isinstance(message.content, list):
                plain["content"] = "\n".join(
                    _text(part, f"messages[{at}].content[{i}]") for i, part in enumerate(message.content)
                )
            if plain.get("audio") is not None:
                raise ApiError(400, "audio is not built yet; send text", param=f"messages[{at}].audio")
            if plain.get("tool_calls") is not None:
                plain["tool_calls"] = called_before(plain["tool_calls"], f"messages[{at}].tool_calls")
            # The SDK writes what a message has not as null, and templates ask whether a name is there.
            plain = {name: value for name, value in plain.items() if value is not None or name == "content"}
            out.append(plain)
        return out

    def encode(self, engine: TextEngine) -> tuple[int, ...]:
        """Token ids of the conversation. Raises ApiError where the model has no chat template."""
        if not engine.chat_template.available:
            raise ApiError(
                400,
                "the model has no chat template: use /v1/completions, or start the server with one "
                "(--chat-template)",
                code="no_chat_template",
            )
        options: dict[str, Any] = {"add_generation_prompt": self.add_generation_prompt}
        if self._tools is not None:
            options |= {"tools": self._tools.listed, "need_tools": not self._tools.forced}
        try:
            return engine.encode_chat(self.conversation(), **options, **(self.chat_template_kwargs or {}))
        except ToolTemplateError:
            raise ApiError(
                400,
                "the model's chat template does not show it any tools, so it cannot choose among them: set "
                'tool_choice to "required" or to one function, which needs no template, or start the server '
                "with a template that has tools (--chat-template)",
                param="tools",
                code="no_tools_in_chat_template",
            ) from None


class ChatRequest(_Generation, _Conversation):
    """POST /v1/chat/completions."""

    max_completion_tokens: int | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _check(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise ApiError(
                400,
                f"max_tokens {self.max_tokens} and max_completion_tokens {self.max_completion_tokens} "
                "differ; give one of them",
                param="max_tokens",
            )
        return self

    def _chosen_tools(self) -> Tools | None:
        tools = read_tools(self.tools, self.tool_choice, self.parallel_tool_calls)
        for name in ("structured_outputs", "response_format"):
            if tools is not None and getattr(self, name) not in (None, {"type": "text"}):
                raise ApiError(
                    400, f"{name} leaves no room for calls; leave it out, or set tool_choice to \"none\"",
                    param=name,
                )  # fmt: skip
        return tools

    @property
    def callable_tools(self) -> Tools | None:
        """The tools that the answer may call."""
        return self._tools

    def params(self, engine: TextEngine) -> SamplingParams:
        """How its tokens are chosen. Raises ApiError for a value out of range."""
        limit = self.max_completion_tokens if self.max_tokens is None else self.max_tokens
        calls = None if self._tools is None else self._tools.outputs()
        return self._params(
            engine,
            **({} if calls is None else {"structured_outputs": calls}),
            max_tokens=_NO_LIMIT if limit is None else limit,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )


class TokenizeRequest(_Body):
    """POST /tokenize: a prompt or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[_Message] | None = None
    add_special_tokens: bool = True
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ApiError(400, "give exactly one of prompt and messages", param="prompt")
        return self

    def encode(self, engine: TextEngine) -> tuple[int, ...]:
        """Its token ids."""
        if self.prompt is not None:
            return engine.encode(self.prompt, add_special_tokens=self.add_special_tokens)
        fields = {"messages", "tools", "add_generation_prompt", "chat_template_kwargs"}
        return _Conversation(**{name: getattr(self, name) for name in fields}).encode(engine)


class DetokenizeRequest(_Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int]


def _biases(given: dict[str, float]) -> dict[int, float]:
    biases: dict[int, float] = {}
    for token, bias in given.items():
        # Not int(): it takes "1_0" and spaces, and is slow on very long digits.
        if not (token.isascii() and token.isdecimal() and len(token) <= 10):
            raise ApiError(
                400, f"logit_bias has the key {token[:40]!r}; keys are token ids", param="logit_bias"
            )
        biases[int(token)] = bias
    return biases


def _format(given: dict[str, Any]) -> dict[str, Any] | None:
    """OpenAI's response_format as structured_outputs."""
    kind, schema = given.get("type"), given.get("json_schema")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json_object": True}
    if kind == "json_schema" and isinstance(schema, dict) and isinstance(schema.get("schema"), dict):
        return {"json": schema["schema"]}
    if kind == "json_schema":
        raise ApiError(
            400, 'response_format of type json_schema needs "json_schema": {"name": ..., "schema": {...}}',
            param="response_format",
        )  # fmt: skip
    raise ApiError(
        400, f"response_format has type {str(kind)[:40]!r}; text, json_object and json_schema are allowed",
        param="response_format",
    )  # fmt: skip


def _text(part: dict[str, Any], where: str) -> str:
    if part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type")
    if isinstance(kind, str) and kind != "text":
        raise ApiError(400, f"content of type {kind[:40]!r} is not built yet; send text", param=where)
    raise ApiError(400, f'{where} must be {{"type": "text", "text": "..."}}', param=where)
