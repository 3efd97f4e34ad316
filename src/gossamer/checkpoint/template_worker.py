"""Renders chat templates in a process of its own; `chat_template.py` starts it as a script.

A template comes with the checkpoint, so it may be hostile, and Python cannot stop code in a thread: a
loop of loops, `'a' * 10**9` or a doubling string would take the server with it, and counting iterations
in the sandbox misses what runs inside one C call. The kernel misses nothing: a timer over CPU time and
a limit on address space end this process, and the parent sees the pipe close.

Protocol: one JSON object per line. First {"template": text} -> {}; then {"variables": {...}} -> {"text"}.
Failures answer {"error": message, "kind": "template" | "messages"}.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

MEMORY_BYTES = 1 << 30
OUTPUT_CHARACTERS = 16 << 20


class _Generation(jinja2.ext.Extension):
    """{% generation %} marks the assistant's part for training; for rendering it is only its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """The environment that transformers gives chat templates (utils/chat_template_utils.py)."""

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


@contextmanager
def _limited(cpu_seconds: float) -> Iterator[None]:
    """CPU time, so that a busy machine ends no honest template; unhandled, the signal ends the process."""
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _render(template: jinja2.Template, variables: dict[str, Any]) -> str:
    blocks: list[str] = []
    size = 0
    for block in template.generate(**variables):
        size += len(block)
        if size > OUTPUT_CHARACTERS:
            raise MemoryError
        blocks.append(block)
    return "".join(blocks)


def _attempt(work: Callable[[], dict[str, Any]], cpu_seconds: float) -> dict[str, Any]:
    try:
        with _limited(cpu_seconds):
            return work()
    except (jinja2.TemplateSyntaxError, jinja2.exceptions.SecurityError, OverflowError) as cause:
        return {"error": f"{type(cause).__name__}: {cause}", "kind": "template"}
    except (MemoryError, RecursionError):
        return {"error": "it needs more memory or recursion than a chat template may use", "kind": "template"}
    except jinja2.TemplateError as cause:
        return {"error": str(cause), "kind": "messages"}
    except Exception as cause:  # whatever an expression can raise over these messages
        return {"error": f"{type(cause).__name__}: {cause}", "kind": "messages"}


def main(cpu_seconds: float) -> None:
    """Serves requests until standard input closes, each within so much CPU time."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Ctrl-C goes to the whole terminal group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    environment = _environment()
    template: jinja2.Template | None = None

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        nonlocal template
        if template is None:
            template = environment.from_string(request["template"])
            return {}
        return {"text": _render(template, request["variables"])}

    for line in sys.stdin.buffer:
        reply = _attempt(partial(answer, json.loads(line)), cpu_seconds)
        sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]))
