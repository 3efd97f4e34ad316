"""Chat templates: messages in, the text that the model was trained to continue out."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gossamer.checkpoint import json_file
from gossamer.errors import RequestError, TokenizerError, ToolTemplateError

__all__ = ["ChatTemplate", "read_templates"]

MAX_TEMPLATE = 1 << 20  # bytes
_WORKER = Path(__file__).with_name("template_worker.py")


class ChatTemplate:
    """The chat templates of a model, rendered in a sandbox with limits on time, memory and output.

    Rendering happens in a small worker process, started at the first use and kept (a render then costs
    a fraction of a millisecond): only a process can be stopped whatever a hostile template does, see
    `template_worker.py`. Safe to use from several threads. Close it, or let it be collected.

    templates: name -> text ("default" and, used when tools are given, "tool_use"); special_tokens:
    variables such as bos_token; cpu_seconds: the most that compiling or one rendering may take.
    """

    def __init__(
        self,
        templates: Mapping[str, str],
        special_tokens: Mapping[str, str | list[str]] | None = None,
        source: str = "the model",
        *,
        cpu_seconds: float = 2.0,
    ) -> None:
        self._templates = dict(templates)
        self._special_tokens = dict(special_tokens or {})
        self._source = source
        self._cpu_seconds = cpu_seconds
        self._workers: dict[str, _Worker] = {}
        self._lock = threading.Lock()

    @classmethod
    def load(
        cls,
        directory: Path,
        special_tokens: Mapping[str, str | list[str]],
        override: str | Path | None = None,
    ) -> ChatTemplate:
        """The templates of a model directory; override: --chat-template, a file or the template itself.

        A model without a template gives an object whose `available` is False. Raises TokenizerError when
        a file is missing or damaged.
        """
        if override is None:
            return cls(read_templates(directory), special_tokens, str(directory))
        if isinstance(override, str) and any(mark in override for mark in ("{{", "{%", "\n")):
            return cls({"default": override}, special_tokens, "the given chat template")
        text = json_file.read_text(Path(override), cap=MAX_TEMPLATE, error=TokenizerError)
        return cls({"default": text}, special_tokens, str(override))

    @property
    def available(self) -> bool:
        """Whether there is any template."""
        return bool(self._templates)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        need_tools: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt for a conversation; encode it with add_special_tokens=False, it has its own.

        messages: each with `role` and what the template wants (`content`, `tool_calls`, ...);
        add_generation_prompt: ends with the opening of the assistant's answer; tools: JSON schemas;
        need_tools: a template that says nothing of the tools it is given is an error;
        variables: further names for the template (enable_thinking, documents, ...).
        Raises TokenizerError when there is no template or it is broken or exceeds its limits,
        ToolTemplateError where it shows no tools, RequestError when it refuses the messages or they are not
        JSON.
        """
        name = self._choose(tools)
        _check_messages(messages)
        values = {
            **self._special_tokens,
            "messages": list(messages),
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **variables,
        }
        try:
            line = json.dumps({"variables": values}, allow_nan=False)
            without = json.dumps({"variables": {**values, "tools": None}}) if tools and need_tools else None
        except (TypeError, ValueError, RecursionError) as cause:
            raise RequestError(f"messages or tools cannot be written as JSON ({cause})") from None
        with self._lock:
            reply = self._ask(name, line)
            unseen = without is not None and "error" not in reply and self._ask(name, without) == reply
        if unseen:
            raise ToolTemplateError(
                f"the chat template of {self._source} does not show the model any tools{_PASS_ANOTHER}"
            )
        if "error" not in reply:
            return str(reply["text"])
        if reply["kind"] == "messages":
            raise RequestError(f"the chat template refuses these messages: {reply['error']}")
        raise TokenizerError(f"the chat template of {self._source} failed: {reply['error']}{_PASS_ANOTHER}")

    def close(self) -> None:
        """Ends the worker processes; a later render starts them again."""
        with self._lock:
            for worker in self._workers.values():
                worker.close()
            self._workers.clear()

    def __del__(self) -> None:
        for worker in getattr(self, "_workers", {}).values():
            worker.close()

    def _choose(self, tools: Sequence[Mapping[str, Any]] | None) -> str:
        if tools is not None and "tool_use" in self._templates:
            return "tool_use"
        if "default" in self._templates:
            return "default"
        if not self._templates:
            raise TokenizerError(
                f"{self._source} has no chat template (looked in chat_template.jinja and "
                f"tokenizer_config.json), so it may not be a chat model: use completions{_PASS_ANOTHER}"
            )
        raise TokenizerError(
            f"{self._source} has the chat templates {', '.join(sorted(self._templates))} but none named "
            f"'default'{_PASS_ANOTHER}"
        )

    def _ask(self, name: str, line: str) -> dict[str, Any]:
        worker = self._workers.get(name)
        reply: dict[str, Any] = {}
        if worker is None:
            worker = self._workers[name] = _Worker(self._cpu_seconds)
            reply = worker.exchange(json.dumps({"template": self._templates[name]}))
        if "error" in reply or worker.ended:
            # A template that does not compile (or never ends compiling) leaves nothing worth keeping.
            self._workers.pop(name).close()
            return reply
        reply = worker.exchange(line)
        if worker.ended:
            self._workers.pop(name).close()
        return reply


_PASS_ANOTHER = "; pass another one with --chat-template FILE"


class _Worker:
    """One `template_worker.py` process and its pipes."""

    def __init__(self, cpu_seconds: float) -> None:
        # -P: the folder of the script holds modules (safetensors, ...) that would hide the real ones.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER), str(cpu_seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    @property
    def ended(self) -> bool:
        """Whether the process is gone, by its limits or otherwise."""
        return self._process.poll() is not None

    def exchange(self, line: str) -> dict[str, Any]:
        """The answer to one request, or an error when the process ends instead."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(line.encode() + b"\n")
            stdin.flush()
            reply = stdout.readline()
        except BrokenPipeError:
            reply = b""
        if reply.endswith(b"\n"):
            return dict(json.loads(reply))
        code = self._process.wait()
        why = "more CPU time than a chat template may use" if code == -signal.SIGPROF else f"exit code {code}"
        return {"error": f"its process was ended ({why})", "kind": "template"}

    def close(self) -> None:
        """Ends the process and waits for it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def read_templates(directory: Path) -> dict[str, str]:
    """Chat templates of a model directory by name; empty when it has none.

    chat_template.jinja comes before tokenizer_config.json's chat_template (a string, or a list of
    {name, template}), as in transformers. Raises TokenizerError when one is damaged.
    """
    path = directory / "chat_template.jinja"
    if path.is_file():
        return {"default": json_file.read_text(path, cap=MAX_TEMPLATE, error=TokenizerError)}
    path = directory / "tokenizer_config.json"
    value = (
        json_file.read_json_object(path, error=TokenizerError).get("chat_template")
        if path.is_file()
        else None
    )
    if value is None:
        return {}
    listed = [{"name": "default", "template": value}] if isinstance(value, str) else value
    try:
        found = {entry["name"]: entry["template"] for entry in listed}
    except (KeyError, TypeError):
        found = {"": None}
    if not all(isinstance(text, str) for pair in found.items() for text in pair):
        raise TokenizerError(f"{path}: chat_template must be a string or a list of {{name, template}}")
    return found


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    if not messages:
        raise RequestError("messages is empty; give at least one message with a role and content")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(f"messages[{index}] needs a string `role` (user, assistant, system, tool)")
