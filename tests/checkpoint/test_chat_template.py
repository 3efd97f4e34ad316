"""Chat templates: the same text as transformers, and no harm from a hostile one."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from gossamer.checkpoint.chat_template import ChatTemplate, read_templates
from gossamer.errors import RequestError, TokenizerError, ToolTemplateError

HELLO = [{"role": "user", "content": "Hi <b>&</b> 'quotes' ✓"}]
TALK = [
    {"role": "system", "content": "Be brief."},
    *HELLO,
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "And?\n\n  indented "},
]
TOOLS = [{"type": "function", "function": {"name": "time", "parameters": {"type": "object", "é": 1.5}}}]
CALLS = [
    *HELLO,
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "time", "arguments": {"z": 1}}}],
    },
    {"role": "tool", "content": "noon"},
]


def render(text: str, messages: Any = HELLO, **variables: Any) -> str:
    template = ChatTemplate({"default": text}, {"bos_token": "<s>"})
    try:
        return template.render(messages, **variables)
    finally:
        template.close()


SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
    "trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA_LIKE = """\
{{ bos_token }}{% set first = namespace(done=false) %}
{%- for message in messages %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}
    {%- if not first.done %}{% set first.done = true %}{{ message | tojson }}{% endif %}
{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}
"""


@pytest.mark.parametrize("name", ["qwen2", "smollm2", "gemma-like"])
def test_same_text_as_transformers(request: pytest.FixtureRequest, name: str) -> None:
    oracle = pytest.importorskip("transformers.utils.chat_template_utils")
    if name == "qwen2":
        text = read_templates(request.getfixturevalue("shared") / "tokenizers" / "qwen2")["default"]
    else:
        text = SMOLLM2 if name == "smollm2" else GEMMA_LIKE
    ours = ChatTemplate({"default": text}, {"bos_token": "<s>"})
    for messages in (HELLO, TALK, CALLS):
        for tools in (None, TOOLS):
            for prompt in (True, False):
                expected, _ = oracle.render_jinja_template(
                    [messages], tools, None, text, add_generation_prompt=prompt, bos_token="<s>"
                )
                got = ours.render(messages, add_generation_prompt=prompt, tools=tools, need_tools=False)
                assert got == expected[0]
    ours.close()


def test_the_environment_is_that_of_transformers() -> None:
    text = (
        "{{ bos_token }}{% for m in messages %}\n"
        "    {% if loop.index > 1 %}{% break %}{% endif %}\n"
        "{% generation %}{{ m | tojson(indent=1) }}{% endgeneration %}\n"
        "{% endfor %}\n"
        "{{ strftime_now('%Y')|length }}{{ missing }}"
        "{{ add_generation_prompt }}{{ tools is none }}{{ extra }}"
    )
    shown = json.dumps(TALK[0], indent=1)
    assert render(text, TALK, extra="é") == f"<s>{shown}4TrueTrueé"


def test_messages_the_template_refuses() -> None:
    with pytest.raises(RequestError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RequestError, match="refuses"):
        render("{{ messages[0].missing.deeper }}")
    for bad in ([], [{"content": "x"}], ["hi"], [{"role": 1}]):
        with pytest.raises(RequestError, match="message"):
            render("x", bad)
    with pytest.raises(RequestError, match="JSON"):
        render("x", [{"role": "user", "content": object()}])


def test_no_template_says_how_to_pass_one(tmp_path: Path) -> None:
    template = ChatTemplate.load(tmp_path, {})
    assert not template.available
    with pytest.raises(TokenizerError, match=r"no chat template.*--chat-template FILE"):
        template.render(HELLO)


def test_where_templates_come_from(tmp_path: Path) -> None:
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "one"}))
    assert read_templates(tmp_path) == {"default": "one"}
    named = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "tools {{ tools | length }}"},
    ]
    config.write_text(json.dumps({"chat_template": named}))
    template = ChatTemplate.load(tmp_path, {})
    assert (template.render(HELLO), template.render(HELLO, tools=TOOLS)) == ("plain", "tools 1")
    template.close()
    (tmp_path / "chat_template.jinja").write_text("file")
    assert read_templates(tmp_path) == {"default": "file"}
    (tmp_path / "own.jinja").write_text("own")
    for override, expected in ((tmp_path / "own.jinja", "own"), ("{{ 1 + 1 }}", "2")):
        template = ChatTemplate.load(tmp_path, {}, override)
        assert template.render(HELLO) == expected
        template.close()
    with pytest.raises(TokenizerError, match="cannot read"):
        ChatTemplate.load(tmp_path, {}, "absent.jinja")
    with pytest.raises(TokenizerError, match="but none named 'default'"):
        ChatTemplate({"rag": "x"}).render(HELLO)


@pytest.mark.parametrize("value", [7, [7], [{"name": "x"}], [{"name": "x", "template": 1}], {"a": "b"}])
def test_damaged_template_entry(tmp_path: Path, value: Any) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    with pytest.raises(TokenizerError, match="chat_template must be"):
        read_templates(tmp_path)


HOSTILE = {
    "loops of loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "range": "{% for a in range(10**12) %}{% endfor %}",
    "exponential macro": "{% macro f(n) %}{{ f(n-1) ~ f(n-1) if n }}{% endmacro %}{{ f(40) }}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "long string": "{{ ('a' * 10**10) | length }}",
    "power": "{{ (9 ** (9 ** 9)) > 0 }}",
    "padding": "{{ 'a'.ljust(10**11) }}",
    "doubling": "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s*2 %}{% endfor %}",
    "output": "{% for i in range(99999) %}{{ 'abcdefgh' * 99 }}{% endfor %}",
    "escape": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "mutation": "{{ messages.append(1) }}",
    "include": "{% include '/etc/passwd' %}",
    "syntax": "{% for %}",
    "compile bomb": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "constant bomb": "{{ 'a' * 9**9 * 9**9 }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_template_ends_in_an_error(name: str) -> None:
    start = time.monotonic()
    template = ChatTemplate({"default": HOSTILE[name]}, cpu_seconds=0.3)
    with pytest.raises((TokenizerError, RequestError)) as caught:
        template.render(HELLO)
    template.close()
    assert time.monotonic() - start < 15
    assert "/" not in str(caught.value).replace("/etc/passwd", "")


def test_a_worker_that_dies_is_replaced() -> None:
    text = (
        "{% for i in range(messages|length * 10**4) %}{% for j in range(10**4) %}{% endfor %}{% endfor %}ok"
    )
    text = "{% if messages|length > 1 %}" + text + "{% else %}ok{% endif %}"
    template = ChatTemplate({"default": text}, cpu_seconds=0.3)
    assert template.render(HELLO) == "ok"
    with pytest.raises(TokenizerError, match="CPU time"):
        template.render(HELLO * 9)
    assert template.render(HELLO) == "ok"
    template.close()
    assert template.render(HELLO) == "ok"
    template.close()


def test_threads_share_a_template() -> None:
    template = ChatTemplate({"default": "{{ messages[0].content }}"})
    got: dict[int, str] = {}

    def ask(n: int) -> None:
        for _ in range(20):
            got[n] = template.render([{"role": "user", "content": f"{n}" * 1000}])
            assert got[n] == f"{n}" * 1000

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    template.close()
    assert len(got) == 4


def test_tools_that_the_template_does_not_show_are_an_error() -> None:
    with pytest.raises(ToolTemplateError, match="--chat-template"):
        render("{{ messages[0].content }}", tools=TOOLS)
    assert render("{{ messages[0].role }}", tools=TOOLS, need_tools=False) == "user"
    assert render("{{ messages[0].role }}", tools=[]) == "user"
    assert render("{% for t in tools %}{{ t.function.name }}{% endfor %}", tools=TOOLS) == "time"
