"""`gossamer`: the verbs, and what becomes of errors.

Exit codes: 0 done, 2 the user's mistake (one line on standard error), 1 ours (a traceback), 130 interrupted.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from gossamer import __version__
from gossamer.cli import (
    ablate,
    bench,
    cache,
    chat,
    compress,
    demo,
    evaluate,
    export,
    generate,
    graph,
    plan,
    probe,
    serve,
    techniques,
)
from gossamer.cli.later import known_elsewhere
from gossamer.cli.options import quiet_output, verb
from gossamer.errors import GossamerError

__all__ = ["app", "main", "run"]

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
app = typer.Typer(
    name="gossamer",
    help="Large language models in little memory, fast, on the machine at hand.",
    epilog="Flags also come from the environment (--max-model-len is GOSSAMER_MAX_MODEL_LEN) and from a TOML "
    "file (--config). Try [bold]gossamer demo[/] first.",
    add_completion=False,
    rich_markup_mode="rich",
    context_settings=_CONTEXT,
    no_args_is_help=False,
)
_RUN, _MAKE, _LOOK = "Run a model", "Make a model", "Look and measure"
app.command(rich_help_panel=_RUN)(verb(demo.demo))
app.command(rich_help_panel=_RUN)(verb(generate.generate))
app.command(rich_help_panel=_RUN)(verb(chat.chat))
app.command(rich_help_panel=_RUN)(verb(serve.serve))
app.command(rich_help_panel=_MAKE)(verb(compress.compress))
app.command(rich_help_panel=_MAKE)(verb(export.export))
app.command(rich_help_panel=_LOOK)(verb(plan.plan))
app.command(rich_help_panel=_LOOK)(verb(ablate.ablate))
app.add_typer(bench.app, name="bench", rich_help_panel=_LOOK)
app.command(name="eval", rich_help_panel=_LOOK)(verb(evaluate.evaluate))
app.command(rich_help_panel=_LOOK)(verb(probe.probe))
app.command(rich_help_panel=_LOOK)(verb(graph.graph))
app.command(rich_help_panel=_LOOK)(verb(techniques.techniques))
app.add_typer(cache.app, name="cache", rich_help_panel=_LOOK)


def _version(value: bool) -> None:
    if value:
        print(f"gossamer {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


def run(arguments: Sequence[str]) -> int:
    """Runs one command line and gives its exit code."""
    try:
        code = typer.main.get_command(app).main(list(arguments), prog_name="gossamer", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except GossamerError as error:
        return _say(str(error))
    except typer.Exit as leave:
        return int(leave.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return _ours()
        quiet_output()
        return _say(f"cannot write: {error.strerror}; make room, or write elsewhere")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("gossamer"):
            return _ours()
        return _say(
            f"{error.name} is not installed, and `{' '.join(['gossamer', *arguments[:1]])}` needs it; "
            "pip install gossamer brings all that it needs"
        )
    except MemoryError:
        return _say(
            "memory ran out, within what limits (ulimit -v, control groups) leave of it; raise them or take "
            "less with --memory-budget"
        )
    except Exception as error:
        if hasattr(error, "format_message"):  # click's own, wherever this version of typer keeps it
            message = error.format_message().rstrip(".")
            return _say(known_elsewhere(arguments, message) or _advised(message, getattr(error, "ctx", None)))
        return _ours()


def _advised(message: str, context: Any) -> str:
    """The parser's complaint, and what to try."""
    path = "gossamer" if context is None else context.command_path
    command: Any = getattr(context, "command", None)
    extra = re.search(r"unexpected extra arguments?(?:\(s\))? \((.*)\)$", message, re.DOTALL)
    if extra and any(p.name == "prompt" for p in command.params):
        text = extra[1].replace("'", "'\\''")
        return f"{message}; did you mean --prompt '{text}'?"
    if message.endswith("?"):  # the parser has found something near
        return f"{message} See `{path} --help`"
    verbs = getattr(command, "commands", {})
    if verbs and message.startswith("No such command") and command is not context.find_root().command:
        return f"{message}; say " + " or ".join(f"`{path} {verb} MODEL`" for verb in verbs)
    return f"{message}; see `{path} --help`"


def _ours() -> int:
    import traceback

    traceback.print_exc()
    return 1


def _say(message: str) -> int:
    print("gossamer: " + " ".join(message.split()), file=sys.stderr)
    return 2


def _open_standard_streams() -> None:
    """Points streams that the caller closed at nothing: a file opened later would take their place."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def main() -> None:
    """The entry point of the `gossamer` command."""
    _open_standard_streams()
    sys.exit(run(sys.argv[1:]))
