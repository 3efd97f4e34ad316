"""`gossamer chat`: a conversation in the terminal, or line by line from a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

from gossamer.cli.engine_flags import EngineFlags
from gossamer.cli.models import model_context
from gossamer.cli.options import flag
from gossamer.cli.sampling_flags import SamplingFlags
from gossamer.cli.show import emit_json, show_start, stderr
from gossamer.errors import GossamerError, TokenizerError

if TYPE_CHECKING:
    from rich.console import Console

    from gossamer.engine.request import SamplingParams
    from gossamer.text_engine import TextEngine

__all__ = ["chat"]

_CONTEXT = 4096  # tokens of KV memory unless --max-model-len says otherwise


def chat(
    engine: EngineFlags,
    sampling: SamplingFlags,
    system: Annotated[
        str | None, flag("--system", metavar="TEXT", help="What the model is told first.")
    ] = None,
    max_tokens: Annotated[int, flag("--max-tokens", "-n", help="Most tokens of an answer.")] = 512,
    chat_template: Annotated[
        str | None, flag("--chat-template", metavar="FILE", help="Instead of the model's own.")
    ] = None,
    json: Annotated[
        bool, flag("--json", help="Print the conversation as one JSON object at its end.")
    ] = False,
) -> None:
    """Talk with a model. /reset forgets, /system TEXT instructs, /exit leaves."""
    from gossamer.bench.memory import memory_figures
    from gossamer.engine.request import SamplingParams
    from gossamer.progress import loading_bar
    from gossamer.text_engine import TextEngine

    given = sampling.given() | {"max_tokens": max_tokens}
    SamplingParams(**given)  # what cannot be is refused before anything is loaded
    config = engine.config(max_num_seqs=1, max_model_len=min(_CONTEXT, model_context(engine)))
    with loading_bar(sys.stderr.isatty()) as bar:
        running = TextEngine.start(config, chat_template=chat_template, progress=bar)
    if not running.chat_template.available:
        raise TokenizerError(
            f"{config.model} has no chat template; give one with --chat-template FILE, "
            "or continue plain text with `gossamer generate`"
        )
    params = running.default_params(**given)
    running.compile(params)
    show_start(running.started)
    talk = _Conversation(running, params, system, live=not json)
    talk.run()
    if json:
        emit_json(
            {
                "messages": talk.messages,
                "turns": talk.turns,
                "memory": memory_figures(running.started.memory),
            }
        )


class _Conversation:
    """Turns of one conversation; an error of one turn ends that turn alone."""

    def __init__(self, engine: TextEngine, params: SamplingParams, system: str | None, *, live: bool) -> None:
        self._engine, self._params, self._system, self._live = engine, params, system, live
        self._console: Console = stderr()
        self.messages: list[dict[str, str]] = []
        self.turns: list[dict[str, Any]] = []
        self._reset()

    def run(self) -> None:
        """Reads lines until there are no more."""
        if sys.stdin.isatty():
            self._console.print("[dim]/reset forgets, /system TEXT instructs, /exit leaves[/]")
        for line in _lines():
            command, _, rest = line.partition(" ")
            if command in ("/exit", "/quit"):
                return
            if command == "/reset":
                self._reset()
                self._console.print("[dim]forgotten[/]")
            elif command == "/system":
                self._system = rest.strip() or None
                self._reset()
                self._console.print("[dim]a new conversation with that instruction[/]")
            elif command.startswith("/"):
                self._console.print(f"[dim]{command} is unknown; there are /reset, /system TEXT and /exit[/]")
            elif line.strip():
                self._turn(line)

    def _reset(self) -> None:
        self.messages[:] = [] if self._system is None else [{"role": "system", "content": self._system}]

    def _turn(self, text: str) -> None:
        from gossamer.cli.stream import run_request

        self.messages.append({"role": "user", "content": text})
        try:
            ids = self._engine.encode_chat(self.messages)
            report = run_request(self._engine, ids, self._params, live=self._live)
        except KeyboardInterrupt:
            self.messages.pop()
            if not sys.stdin.isatty():
                raise
            self._console.print("[dim]stopped; the answer is forgotten[/]")
            return
        except GossamerError as error:
            self.messages.pop()
            if not sys.stdin.isatty():
                raise
            self._console.print(f"[red]{error}[/]  [dim](/reset begins anew)[/]", soft_wrap=True)
            return
        self.messages.append({"role": "assistant", "content": report["text"]})
        self.turns.append({key: report[key] for key in ("text", "finish_reason", "timing", "token_ids")})


def _lines() -> Iterator[str]:
    if not sys.stdin.isatty():
        for line in sys.stdin:
            yield line.rstrip("\n")
        return
    import readline  # noqa: F401  # editing and history in input()

    while True:
        try:
            print("\n> ", end="", file=sys.stderr, flush=True)
            yield input()
        except EOFError:
            return
