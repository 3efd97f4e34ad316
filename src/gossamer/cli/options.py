"""How a function becomes a verb: flags with environment variables, flags as dataclasses, --config."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from gossamer.cli.config_file import apply_config_file

__all__ = ["flag", "quiet_output", "verb"]


def flag(*names: str, help: str, panel: str | None = None, **options: Any) -> Any:
    """A typer option whose environment variable is GOSSAMER_ and its long name: --max-tokens is
    GOSSAMER_MAX_TOKENS."""
    long = next(name for name in names if name.startswith("--"))
    return typer.Option(
        *names,
        help=help,
        rich_help_panel=panel,
        envvar="GOSSAMER_" + long.partition("/")[0].removeprefix("--").replace("-", "_").upper(),
        show_envvar=False,
        **options,
    )


def _read_config_file(ctx: typer.Context, value: Path | None) -> Path | None:
    if value is not None:
        apply_config_file(ctx, value)
    return value


_CONFIG = flag(
    "--config",
    metavar="FILE",
    is_eager=True,
    callback=_read_config_file,
    help="Take flags from a TOML file; the command line and the environment win over it.",
)


def verb(function: Callable[..., int | None]) -> Callable[..., int | None]:
    """Completes a verb for typer: a parameter whose type is a dataclass becomes that class's flags, and
    --config is added; a parameter `ctx` is typer's context. A pipe closed by its reader ends the verb
    quietly."""
    hints = get_type_hints(function, include_extras=True)
    parameters: dict[str, tuple[Any, Any]] = {"ctx": (typer.Context, inspect.Parameter.empty)}
    groups: dict[str, tuple[Any, list[str]]] = {}
    wanted = inspect.signature(function).parameters
    for name, own in wanted.items():
        if name == "ctx":
            continue
        group = hints[name]
        if is_dataclass(group):
            inner = get_type_hints(group, include_extras=True)
            groups[name] = (group, [f.name for f in fields(group)])
            parameters |= {
                f.name: (inner[f.name], inspect.Parameter.empty if f.default is MISSING else f.default)
                for f in fields(group)
            }
        else:
            parameters[name] = (group, own.default)
    parameters["config"] = (Annotated[Path | None, _CONFIG], None)

    @functools.wraps(function)
    def run(ctx: typer.Context, config: Path | None, **given: Any) -> int | None:
        if given.get("model_flag"):
            _one_model(ctx, given["model"], given["model_flag"])
        for name, (group, names) in groups.items():
            given[name] = group(**{n: given.pop(n) for n in names})
        if "ctx" in wanted:
            given["ctx"] = ctx
        try:
            return function(**given)
        except BrokenPipeError:
            quiet_output()
            raise typer.Exit(141) from None  # as the shell reports a program that SIGPIPE ended

    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for name, (annotation, default) in parameters.items()
        ]
    )
    run.__annotations__ = {name: annotation for name, (annotation, _) in parameters.items()}
    return run


def _one_model(ctx: typer.Context, positional: str | None, option: str) -> None:
    source = ctx.get_parameter_source("model")
    if positional not in (None, option) and source is not None and source.name == "COMMANDLINE":
        raise typer.BadParameter(f"two models were given, {positional!r} and {option!r}; give one", ctx=ctx)


def quiet_output() -> None:
    """Points standard output at nothing, so that Python's last flush is silent too."""
    import os
    import sys

    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
