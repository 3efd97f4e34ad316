"""Tools: which functions a model may call, and the calls in what it wrote."""

from __future__ import annotations

import json
import re
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gossamer.engine.grammar_compiler import WHITE_SPACE
from gossamer.engine.request import StructuredOutputs
from gossamer.errors import RequestError
from gossamer.server.errors import ApiError

__all__ = ["CallReader", "Tools", "called_before", "read_tools", "whole_message"]

MAX_TOOLS = 128
MAX_SCHEMAS = 90_000  # characters of all schemas together: the grammar of all of them has a limit too
MAX_CALLS = 16  # that "required" allows in one answer: a small model may never come to the end of a list
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
_NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}

Part = str | dict[str, Any]
"""What is new in an answer: text of its content, or a delta of one call in OpenAI's form."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """The functions of a request. listed: as the client sent them; schemas: name -> JSON schema of its
    arguments; name: the one that must be called; parallel: whether an answer may hold several calls."""

    listed: list[dict[str, Any]]
    schemas: Mapping[str, Mapping[str, Any]]
    mode: Literal["auto", "required", "named"]
    name: str = ""
    parallel: bool = True

    @property
    def forced(self) -> bool:
        """Whether the answer is nothing but calls."""
        return self.mode != "auto"

    def outputs(self) -> dict[str, Any] | None:
        """The structured_outputs that force the calls; None where the model is free."""
        if self.mode == "named":
            return {"json": self.schemas[self.name]}
        return {"grammar": self._list_of_calls()} if self.mode == "required" else None

    def _list_of_calls(self) -> str:
        """A grammar of `[{"name": ..., "arguments": {...}}, ...]`, its white space fixed outside arguments.

        Every schema stays a root of its own, so that the references inside it keep their meaning.
        """
        more = f'(", " call){{0,{MAX_CALLS - 1}}} ' if self.parallel else ""
        rules = [
            f'start: "[" call {more}"]"',
            "call: " + " | ".join(f"f{i}" for i in range(len(self.schemas))),
        ]
        for i, (name, schema) in enumerate(self.schemas.items()):
            head = json.dumps(f'{{"name": "{name}", "arguments": ')
            spaced = {**schema, "x-guidance": {"whitespace_pattern": WHITE_SPACE}}
            # A brace before a digit can only stand in a string; the grammar's repetitions look the same.
            text = re.sub(r"\{(?=\s*\d)", r"\\u007b", json.dumps(spaced, ensure_ascii=False))
            rules += [f'f{i}: {head} a{i} "}}"', f"a{i}: %json {text}"]
        return "\n".join(rules)

    def reader(self) -> CallReader:
        """What finds the calls in one output."""
        if self.mode == "named":
            return _Named(self.name)
        return _Listed() if self.mode == "required" else _Free(self.schemas, self.parallel)

    def blame(self, error: RequestError) -> RequestError:
        """An error in the words of this request, which knows of no structured_outputs."""
        what, _, why = str(error).partition(": ")
        if what != "structured_outputs" or not self.forced:
            return error
        why = why.removeprefix("the grammar cannot be used: ").removeprefix(
            "the json schema cannot be used: "
        )
        return RequestError(f"tools: their parameters cannot be used: {why}")


def read_tools(
    tools: list[dict[str, Any]] | None, choice: str | dict[str, Any] | None, parallel: bool | None
) -> Tools | None:
    """The tools of a request; None where none may be called. Raises ApiError."""
    if not tools:
        if choice not in (None, "none", "auto"):
            raise ApiError(400, "tool_choice needs tools; give at least one", param="tool_choice")
        return None
    if len(tools) > MAX_TOOLS:
        raise ApiError(400, f"tools has {len(tools)} entries; at most {MAX_TOOLS} are allowed", param="tools")
    schemas: dict[str, dict[str, Any]] = {}
    strict, size = "", 0
    for at, tool in enumerate(tools):
        name, schema, length = _function(tool, f"tools[{at}]")
        size += length
        if name in schemas:
            raise ApiError(400, f"tools has two functions named {name!r}; names must differ", param="tools")
        schemas[name] = schema
        strict = strict or (name if tool["function"].get("strict") else "")
    if size > MAX_SCHEMAS:
        raise ApiError(
            400,
            f"tools has parameters of {size} characters; at most {MAX_SCHEMAS} are allowed",
            param="tools",
        )
    made = _chosen(choice, tools, schemas, parallel is not False)
    if made is not None and strict and not made.forced:
        raise ApiError(
            400,
            f"tools: strict is true for {strict!r}, but where tool_choice is auto nothing holds the model to "
            'a schema; leave strict out, or set tool_choice to "required" or to one function',
            param="tools",
        )
    return made


def _chosen(
    choice: str | dict[str, Any] | None,
    tools: list[dict[str, Any]],
    schemas: dict[str, dict[str, Any]],
    parallel: bool,
) -> Tools | None:
    match choice:
        case "none":
            return None
        case None | "auto":
            return Tools(listed=tools, schemas=schemas, mode="auto", parallel=parallel)
        case "required":
            return Tools(listed=tools, schemas=schemas, mode="required", parallel=parallel)
        case {"type": "function", "function": {"name": str(name)}} if name in schemas:
            return Tools(listed=tools, schemas=schemas, mode="named", name=name)
        case {"type": "function", "function": {"name": str(name)}}:
            raise ApiError(
                400, f"tool_choice names {name[:64]!r}, which is not among tools", param="tool_choice"
            )
    raise ApiError(
        400,
        'tool_choice must be "none", "auto", "required" or {"type": "function", "function": {"name": ...}}',
        param="tool_choice",
    )


def _function(tool: dict[str, Any], where: str) -> tuple[str, dict[str, Any], int]:
    """(name, schema of the arguments, its length in characters) of one tool."""
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, dict):
        raise ApiError(
            400, f'{where} must be {{"type": "function", "function": {{"name": ...}}}}', param=where
        )
    name, schema = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ApiError(
            400,
            f"{where}.function.name {str(name)[:80]!r} must be 1 to 64 letters, digits, '_', '-' and '.'",
            param=f"{where}.function.name",
        )
    where += ".function.parameters"
    if schema is None or schema == {}:
        schema = _NOTHING
    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        raise ApiError(400, f'{where} must be a JSON schema of "type": "object"', param=where)
    schema = {"type": "object", **schema}
    try:
        text = str(StructuredOutputs(json=schema).json)
    except RequestError as error:
        raise ApiError(400, f"{where}: {str(error).partition(': ')[2]}", param=where) from None
    return name, schema, len(text)


def called_before(calls: Any, where: str) -> list[dict[str, Any]]:
    """The tool_calls of an earlier message as templates read them: arguments are objects. Raises ApiError."""
    if not isinstance(calls, list):
        raise ApiError(400, f"{where} must be a list of calls", param=where)
    out = []
    for at, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            says = f'{where}[{at}] must be {{"id": ..., "type": "function", "function": {{"name": ...}}}}'
            raise ApiError(400, says, param=f"{where}[{at}]")
        arguments = function.get("arguments")
        if not isinstance(arguments, dict):
            arguments = _object(arguments or "{}")
            if arguments is None:
                place = f"{where}[{at}].function.arguments"
                raise ApiError(400, f"{place} is not a JSON object in text", param=place)
        out.append({**call, "function": {**function, "arguments": arguments}})
    return out


class CallReader(ABC):
    """Reads one output as it comes."""

    def __init__(self) -> None:
        self.calls = 0  # begun so far

    @abstractmethod
    def push(self, text: str) -> list[Part]:
        """What new text brings; some may be held back."""

    def finish(self) -> list[Part]:
        """What was held back."""
        return []

    def reason(self, reason: str | None) -> str | None:
        """The finish_reason to tell, of the engine's."""
        return "tool_calls" if reason == "stop" and self._complete() else reason

    @abstractmethod
    def _complete(self) -> bool:
        """Whether the output is calls that came to their end."""

    def _begin(self, name: str, arguments: str = "") -> Part:
        self.calls += 1
        return {
            "index": self.calls - 1,
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }

    def _more(self, arguments: str) -> Part:
        return {"index": self.calls - 1, "function": {"arguments": arguments}}


class _Named(CallReader):
    """The output is the arguments of one function. OpenAI ends such an answer with "stop"."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def push(self, text: str) -> list[Part]:
        begin = [] if self.calls else [self._begin(self._name)]
        return [*begin, self._more(text)] if text else begin

    def _complete(self) -> bool:
        return False


class _Listed(CallReader):
    """The output follows the grammar of `Tools._list_of_calls`; arguments are passed on as they come."""

    _HEAD = re.compile(r'(?:\[|\}, )\{"name": "([^"]+)", "arguments": ')

    def __init__(self) -> None:
        super().__init__()
        self._between = ""  # text outside arguments
        self._inside = self._string = self._escaped = False
        self._depth = 0

    def push(self, text: str) -> list[Part]:
        parts: list[Part] = []
        begin = 0
        for at, char in enumerate(text):
            if self._inside:
                self._scan(char)
                if not self._inside:
                    parts.append(self._more(text[begin : at + 1]))
                continue
            self._between += char
            head = self._HEAD.fullmatch(self._between) if char == " " else None
            if head is not None:
                parts.append(self._begin(head[1]))
                self._between, self._inside, begin = "", True, at + 1
        if self._inside and text[begin:]:
            parts.append(self._more(text[begin:]))
        return parts

    def _scan(self, char: str) -> None:
        """Follows the JSON of arguments to its end."""
        if self._string:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._string = False
        elif char == '"':
            self._string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            self._inside = self._depth > 0

    def _complete(self) -> bool:
        return self._between == "}]"


class _Free(CallReader):
    """The model writes what it likes. Calls are what comes in one of the forms that models are taught:

    `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` anywhere (Hermes, Qwen), or an output that is
    nothing but {"name": ..., "arguments" or "parameters": {...}}, alone, in a list or in a row (Llama 3.1,
    Mistral). What names no function of the request is text. A call comes whole. parallel: whether calls after
    the first count; if not, they are left out.
    """

    _OPEN, _CLOSE = "<tool_call>", "</tool_call>"
    _JSON = re.compile(r'(\[\s*)?\{\s*"(name|arguments|parameters|type|function|id)"')
    _ENOUGH = 64  # characters by which an output that is a call shows it

    def __init__(self, names: Mapping[str, object], parallel: bool) -> None:
        super().__init__()
        self._names, self._parallel = names, parallel
        self._held = ""
        self._read: Callable[[], list[Part]] = self._start

    def push(self, text: str) -> list[Part]:
        self._held += text
        parts: list[Part] = []
        while True:
            before = self._read
            parts += self._read()
            if self._read == before:
                return parts

    def finish(self) -> list[Part]:
        held, self._held = self._held, ""
        inner = held.strip()
        if self._read == self._tagged:
            inner = inner.removeprefix(self._OPEN)
        calls = None if self._read == self._text else _calls(inner, self._names)
        if calls is not None:
            return self._take(calls)
        return [held] if held and not (self.calls and held.isspace()) else []

    def _start(self) -> list[Part]:
        """Nothing is known yet."""
        seen = self._held.lstrip()
        if seen and (seen[0] not in "{[" or (len(seen) >= self._ENOUGH and not self._JSON.match(seen))):
            self._read = self._text
        return []

    def _text(self) -> list[Part]:
        """Shows text up to a tag, and holds back what may become one, with the white space before it."""
        at = self._held.find(self._OPEN)
        if at >= 0:
            shown, self._held = self._held[:at].rstrip(), self._held[at:]
            self._read = self._tagged
        else:
            most = min(len(self._OPEN) - 1, len(self._held))
            part = next((n for n in range(most, 0, -1) if self._OPEN.startswith(self._held[-n:])), 0)
            shown = self._held[: len(self._held) - part].rstrip()
            self._held = self._held[len(shown) :]
        return [shown] if shown else []

    def _tagged(self) -> list[Part]:
        """Waits for the end of a tag."""
        end = self._held.find(self._CLOSE)
        if end < 0:
            return []
        block, self._held = self._held[: end + len(self._CLOSE)], self._held[end + len(self._CLOSE) :]
        self._read = self._text
        calls = _calls(block[len(self._OPEN) : end], self._names)
        return [block] if calls is None else self._take(calls)

    def _take(self, calls: list[tuple[str, str]]) -> list[Part]:
        room = len(calls) if self._parallel else max(0, 1 - self.calls)
        return [self._begin(*call) for call in calls[:room]]

    def _complete(self) -> bool:
        return self.calls > 0


def _calls(text: str, names: Mapping[str, object]) -> list[tuple[str, str]] | None:
    """(name, arguments as JSON) of each call in a text that is nothing else; None where it is not."""
    found: list[Any] = []
    decoder = json.JSONDecoder(parse_constant=_refuse)
    text, at = text.strip(), 0
    try:
        while at < len(text):
            value, at = decoder.raw_decode(text, at)
            found += value if isinstance(value, list) else [value]
            while at < len(text) and text[at] in ",; \t\r\n":
                at += 1
        calls = [_call(value) for value in found]
    except (ValueError, RecursionError):
        return None
    good = [call for call in calls if call is not None and call[0] in names]
    return good if good and len(good) == len(calls) else None


def _call(value: Any) -> tuple[str, str] | None:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        arguments = _object(arguments)
    elif arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        return None
    return value["name"], json.dumps(arguments, ensure_ascii=False)


def _object(text: Any) -> dict[str, Any] | None:
    """The object that a text is in JSON; None where it is none."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (TypeError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def whole_message(parts: Sequence[Part]) -> tuple[str | None, list[dict[str, Any]]]:
    """(content, tool_calls) of a message; content is None where there is nothing but calls."""
    content, calls = "", list[dict[str, Any]]()
    for part in parts:
        if isinstance(part, str):
            content += part
        elif "id" in part:
            calls.append({name: part[name] for name in ("id", "type")} | {"function": dict(part["function"])})
        else:
            calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
    return (content or None if calls else content), calls
