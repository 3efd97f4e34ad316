"""Tools by the openai SDK: forced calls by a grammar, free calls in the forms that models write, mistakes.

The engine is real, its executor none: it draws tokens by a hash, or writes what a test tells it to.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.engine.step import Sampling
from gossamer.runtime.null import NullExecutor
from gossamer.server.tools import MAX_CALLS, Tools, whole_message
from gossamer.text_engine import TextEngine
from tests.server.serving import STORY, Live, serving, text_engine, wait_for
from tests.server.test_errors import problem

TEMPLATE = (
    "{% for t in tools or [] %}You may call {{ t.function.name }}: {{ t | tojson }} {% endfor %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content or '' }}{% if m.tool_calls is defined %}"
    "{% for c in m.tool_calls %}{{ c.function.name }}{% for k, v in c.function.arguments.items() %}"
    " {{ k }}={{ v }}{% endfor %}{% endfor %}{% endif %} {% endfor %}"
)
WEATHER = {
    "type": "object",
    "$defs": {"place": {"enum": ["Rome", 'O"slo{']}},
    "properties": {
        "city": {"$ref": "#/$defs/place"},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "description": "x{20000}", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now"}},
]
ASK: list[Any] = [{"role": "user", "content": STORY}]
NAMED: Any = {"type": "function", "function": {"name": "weather"}}


@dataclass
class Told:
    """What the model writes instead of its hash."""

    ids: list[int] = field(default_factory=list)

    def choose(self, sampling: Sampling, token: int) -> int:
        at = len(sampling.output_ids)
        return self.ids[at] if at < len(self.ids) else token


@dataclass
class Server:
    live: Live
    told: Told

    def says(self, text: str) -> None:
        """From now on every output is this text."""
        tokenizer = self.live.engine.tokenizer
        assert tokenizer is not None
        self.told.ids = [*tokenizer.encode(text, add_special_tokens=False), self.live.engine.eos_ids[0]]

    def ask(self, **more: Any) -> Any:
        create: Any = self.live.sdk.chat.completions.create
        return create(
            **({"model": "stories", "messages": ASK, "tools": TOOLS, "max_tokens": 1500, "seed": 1} | more)
        )

    def both(self, **more: Any) -> tuple[str | None, list[tuple[str, str]], str]:
        """(content, calls, reason) of an answer, which is the same streamed."""
        choice = self.ask(**more).choices[0]
        calls = [(c.function.name, c.function.arguments) for c in choice.message.tool_calls or []]
        content, streamed, reason = "", list[list[str]](), ""
        ids: list[str] = []
        for chunk in self.ask(**more, stream=True):
            (part,) = chunk.choices
            content += part.delta.content or ""
            for call in part.delta.tool_calls or []:
                if call.id:
                    assert call.index == len(streamed) and call.type == "function"
                    streamed.append([call.function.name, ""])
                    ids.append(call.id)
                streamed[call.index][1] += call.function.arguments
            reason = part.finish_reason or reason
        assert (content, [tuple(c) for c in streamed], reason) == (
            choice.message.content or "", calls, choice.finish_reason
        )  # fmt: skip
        assert len(set(ids)) == len(ids)
        return choice.message.content, calls, reason


@pytest.fixture(scope="module")
def _tooled(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    told = Told()
    longer = tmp_path_factory.mktemp("model")
    for path in model.iterdir():
        (longer / path.name).symlink_to(path)
    config = json.loads((model / "config.json").read_text())
    (longer / "config.json").unlink()
    (longer / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    started = text_engine(longer, max_num_seqs=4).started
    engine = TextEngine(replace(started, executor=NullExecutor(started.executor.limits, choose=told.choose)))
    with serving(engine, chat_template=TEMPLATE) as live:
        yield Server(live, told)
        wait_for(live.idle)


@pytest.fixture
def server(_tooled: Server) -> Server:
    _tooled.told.ids = []
    return _tooled


def fits(name: str, arguments: str) -> bool:
    value = json.loads(arguments)
    if name == "now":
        return bool(value == {})
    return (
        value.keys() == {"city", "days"} and value["city"] in ("Rome", 'O"slo{') and 1 <= value["days"] <= 9
    )


@pytest.mark.parametrize("seed", range(4))
def test_required_calls_are_a_list_that_fits_the_schemas(server: Server, seed: int) -> None:
    content, calls, reason = server.both(tool_choice="required", seed=seed)
    assert content is None and reason == "tool_calls" and 1 <= len(calls) <= MAX_CALLS
    assert all(fits(*call) for call in calls)
    _, calls, reason = server.both(tool_choice="required", parallel_tool_calls=False, seed=seed)
    assert reason == "tool_calls" and len(calls) == 1 and fits(*calls[0])


def test_several_outputs_hold_calls_of_their_own(server: Server) -> None:
    for choice in server.ask(tool_choice="required", n=3).choices:
        assert choice.finish_reason == "tool_calls"
        assert all(fits(c.function.name, c.function.arguments) for c in choice.message.tool_calls)


@pytest.mark.parametrize("seed", range(4))
def test_a_named_function_is_called_once_and_ends_with_stop(server: Server, seed: int) -> None:
    """As OpenAI has it: "tool_calls" is for where the model had a choice."""
    content, calls, reason = server.both(tool_choice=NAMED, seed=seed)
    assert (content, reason) == (None, "stop")
    assert [name for name, _ in calls] == ["weather"] and fits(*calls[0])


def test_arguments_are_streamed_as_they_come(server: Server) -> None:
    for choice in ("required", NAMED):
        parts = [
            call.function.arguments
            for chunk in server.ask(tools=TOOLS[:1], tool_choice=choice, stream=True)
            for call in chunk.choices[0].delta.tool_calls or []
        ]
        assert len([part for part in parts if part]) > 5


def test_calls_cut_short_say_so(server: Server) -> None:
    for choice in ("required", NAMED):
        _, _, reason = server.both(tool_choice=choice, max_tokens=4)
        assert reason == "length"


CALL = '{"name": "now", "arguments": {}}'


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (f"<tool_call>\n{CALL}\n</tool_call>", None, [("now", {})]),
        (
            'Let me see. <tool_call>{"name": "weather", "arguments": {"city": "A}"}}</tool_call>\n'
            f"<tool_call>{CALL}</tool_call>",
            "Let me see.",
            [("weather", {"city": "A}"}), ("now", {})],
        ),
        (f"<tool_call>{CALL}", None, [("now", {})]),
        ('{"name": "weather", "parameters": {"city": "Rome"}}', None, [("weather", {"city": "Rome"})]),
        ('{"type": "function", "function": {"name": "now", "arguments": "{}"}}', None, [("now", {})]),
        (f"[{CALL}, {CALL}]", None, [("now", {})] * 2),
        (f"{CALL}; {CALL}", None, [("now", {})] * 2),
        ('{"name": "launch", "arguments": {}}', ..., []),
        ('<tool_call>{"name": "launch"}</tool_call> no', ..., []),
        ("<tool_call>{", ..., []),
        ("a <b> and <tool_ca", ..., []),
        ('{"answer": 42} is what I say, and there is more to it than that, as you may see here', ..., []),
        ("[1] is a note", ..., []),
        ('{"name": "now", "arguments": [NaN]}', ..., []),
    ],
)
def test_free_calls(server: Server, text: str, content: Any, calls: list[tuple[str, Any]]) -> None:
    server.says(text)
    found, made, reason = server.both(temperature=0)
    assert [(name, json.loads(arguments)) for name, arguments in made] == calls
    assert reason == ("tool_calls" if calls else "stop")
    # SentencePiece begins a text with a space.
    assert (found and found.strip()) == (text if content is ... else content)


def test_free_text_is_not_held_back(server: Server) -> None:
    server.says("Once upon a time there was a girl who called nobody")
    parts = [chunk.choices[0].delta.content for chunk in server.ask(stream=True)]
    assert len([part for part in parts if part]) > 5


def test_free_calls_one_at_a_time(server: Server) -> None:
    server.says(f"<tool_call>{CALL}</tool_call><tool_call>{CALL}</tool_call>")
    _, calls, reason = server.both(parallel_tool_calls=False)
    assert len(calls) == 1 and reason == "tool_calls"


def test_none_calls_nothing(server: Server) -> None:
    server.says(CALL)
    content, calls, reason = server.both(tool_choice="none")
    assert content is not None and content.strip() == CALL and calls == [] and reason == "stop"


@given(
    st.lists(
        st.tuples(st.sampled_from(["weather", "now"]), st.dictionaries(st.text(), st.text())), min_size=1
    ),
    st.lists(st.integers(1, 9), min_size=1),
    st.sampled_from(["required", "auto", "tags"]),
)
def test_calls_are_read_whatever_the_pieces(
    calls: list[tuple[str, dict[str, str]]], pieces: list[int], form: str
) -> None:
    schemas: dict[str, Any] = {"weather": {}, "now": {}}
    mode: Any = "required" if form == "required" else "auto"
    reader = Tools(listed=[], schemas=schemas, mode=mode).reader()
    texts = [json.dumps({"name": name, "arguments": arguments}) for name, arguments in calls]
    if form == "tags":
        texts = [text.replace("</tool_call>", "") for text in texts]
        text = "".join(f"<tool_call>{each}</tool_call>" for each in texts)
    else:
        text = f"[{', '.join(texts)}]"
    parts, at = [], 0
    while at < len(text):
        size = pieces[at % len(pieces)]
        parts += reader.push(text[at : at + size])
        at += size
    content, made = whole_message(parts + reader.finish())
    assert content is None and reader.reason("stop") == "tool_calls"
    assert [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in made] == calls


def test_a_conversation_with_calls_goes_through_the_template(server: Server) -> None:
    first = server.ask(tool_choice=NAMED).choices[0].message
    call = first.tool_calls[0]
    answer = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    messages = [*ASK, first.model_dump(), answer]
    assert server.ask(messages=messages, tool_choice="none", max_tokens=2).choices[0].message.content
    ids = server.live.http.post("/tokenize", json={"messages": messages, "tools": TOOLS}).json()["tokens"]
    text = server.live.http.post("/detokenize", json={"tokens": ids}).json()["prompt"]
    city = json.loads(call.function.arguments)["city"]
    assert "You may call now" in text and f"weather city={city}" in text and "tool: rain" in text


def test_a_template_without_tools_is_told(live: Live) -> None:
    error = problem(live.chat(tools=TOOLS), 400)
    assert (
        error["param"] == "tools" and "required" in error["message"] and "--chat-template" in error["message"]
    )
    choice = live.chat(tools=TOOLS, tool_choice=NAMED, max_tokens=200).json()["choices"][0]
    assert fits("weather", choice["message"]["tool_calls"][0]["function"]["arguments"])


def function(**changed: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f"} | changed}


DEEP: dict[str, Any] = {}
for _ in range(80):
    DEEP = {"type": "object", "properties": {"a": DEEP}}


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("tool_choice", {"tool_choice": "required"}),
        ("tool_choice", {"tools": TOOLS, "tool_choice": "any"}),
        (
            "tool_choice",
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "launch"}}},
        ),
        ("tool_choice", {"tools": TOOLS, "tool_choice": {"type": "function", "name": "now"}}),
        ("tools[0]", {"tools": [{"type": "custom", "custom": {"name": "f"}}]}),
        ("tools[0]", {"tools": [{"type": "function"}]}),
        ("tools[1].function.name", {"tools": [function(), function(name="a b")]}),
        ("tools[0].function.name", {"tools": [function(name="x" * 65)]}),
        ("tools", {"tools": [function(), function()]}),
        ("tools", {"tools": [function(name=f"f{i}") for i in range(129)]}),
        ("tools", {"tools": [function(strict=True)]}),
        ("tools[0].function.parameters", {"tools": [function(parameters={"type": "array"})]}),
        ("tools[0].function.parameters", {"tools": [function(parameters=DEEP)]}),
        ("tools", {"tools": [function(name=f"f{i}", parameters={"title": "x" * 50_000}) for i in range(2)]}),
        ("response_format", {"tools": TOOLS, "response_format": {"type": "json_object"}}),
        ("structured_outputs", {"tools": TOOLS, "structured_outputs": {"regex": "a"}}),
        ("chat_template_kwargs", {"chat_template_kwargs": {"tools": []}}),
        ("messages[0].tool_calls", {"messages": [{"role": "assistant", "tool_calls": {}}]}),
        ("messages[0].tool_calls[0]", {"messages": [{"role": "assistant", "tool_calls": [{}]}]}),
        (
            "messages[0].tool_calls[0].function.arguments",
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}
                ]
            },
        ),
    ],
)
def test_mistakes_are_named(server: Server, param: str, body: dict[str, Any]) -> None:
    error = problem(server.live.chat(**body), 400)
    assert error["param"] == param and param.split("[")[0] in error["message"]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "f"}}])
def test_schemas_that_do_not_compile_are_blamed_on_the_tools(server: Server, choice: Any) -> None:
    bad = {"properties": {"a": {"type": "string", "pattern": "(?=a)b"}}, "required": ["a"]}
    error = problem(server.live.chat(tools=[function(parameters=bad)], tool_choice=choice), 400)
    assert re.match("tools: their parameters cannot be used: ", error["message"])


def test_many_tools_with_large_schemas_compile(live: Live) -> None:
    fields = {f"field{i}": {"type": "string", "description": "what it is for " * 3} for i in range(5)}
    many = [function(name=f"tool{i}", parameters={"properties": fields}) for i in range(128)]
    choice = {"type": "function", "function": {"name": "tool77"}}
    assert live.chat(tools=many, tool_choice=choice, max_tokens=2).status_code == 200
    assert live.chat(tools=many, tool_choice="required", max_tokens=2).status_code == 200
