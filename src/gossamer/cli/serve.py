"""`gossamer serve`: the OpenAI-compatible server."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from gossamer.cli.engine_flags import EngineFlags
from gossamer.cli.options import flag
from gossamer.cli.show import emit_json, show_start, stderr

if TYPE_CHECKING:
    from gossamer.text_engine import TextEngine

__all__ = ["serve"]

_PANEL = "Server"


def serve(
    ctx: typer.Context,
    engine: EngineFlags,
    host: Annotated[
        str, flag("--host", panel=_PANEL, metavar="ADDRESS", help="Where to listen.")
    ] = "127.0.0.1",
    port: Annotated[int, flag("--port", panel=_PANEL, help="TCP port; 0 takes a free one.")] = 8000,
    served_model_name: Annotated[
        str | None, flag("--served-model-name", panel=_PANEL, metavar="NAME", help="The name clients use.")
    ] = None,
    api_key: Annotated[
        str | None, flag("--api-key", panel=_PANEL, metavar="KEY", help="Asked of every request but /health.")
    ] = None,
    chat_template: Annotated[
        str | None,
        flag("--chat-template", panel=_PANEL, metavar="FILE", help="Instead of the model's own."),
    ] = None,
    max_num_queued_reqs: Annotated[
        int, flag("--max-num-queued-reqs", panel=_PANEL, metavar="N", help="Most that may wait; 429 past it.")
    ] = 256,
    shutdown_timeout: Annotated[
        float, flag("--shutdown-timeout", panel=_PANEL, metavar="SECONDS", help="To finish after SIGTERM.")
    ] = 30.0,
    metrics_prefix: Annotated[
        str, flag("--metrics-prefix", panel=_PANEL, metavar="NAME", help="vllm suits its dashboards.")
    ] = "gossamer",
    no_plan: Annotated[
        bool,
        flag("--no-plan", panel=_PANEL, help="Take the defaults of flags that are not given, unplanned."),
    ] = False,
    json: Annotated[bool, flag("--json", help="Print one JSON object once ready: url, memory.")] = False,
) -> None:
    """Serve the OpenAI API: /v1/models, /v1/completions, /v1/chat/completions.

    Flags of the engine that are not given come from the easy plan (see `gossamer plan`), which is printed.
    """
    from gossamer.bench.memory import memory_figures
    from gossamer.cli.easy import easy_plan
    from gossamer.runtime.start import device_of
    from gossamer.server.run import serve as run
    from gossamer.server.settings import ServerSettings

    settings = ServerSettings(
        host=host,
        port=port,
        served_model_name=served_model_name,
        api_key=api_key,
        chat_template=chat_template,
        max_num_queued_reqs=max_num_queued_reqs,
        shutdown_timeout=shutdown_timeout,
        metrics_prefix=metrics_prefix,
    )
    config, said = (engine.config(), "") if no_plan else easy_plan(ctx, engine)
    device_of(config)  # a server that comes up and then finds no GPU is of no use
    if said:
        stderr().print(said, style="dim", markup=False, soft_wrap=True)

    def ready(running: TextEngine, url: str) -> None:
        show_start(running.started)
        stderr().print(f"serving on [bold]{url}[/]  [dim](Ctrl-C ends it)[/]")
        if json:
            emit_json({"url": url, "model": config.model, "memory": memory_figures(running.started.memory)})

    run(config, settings, on_ready=ready, progress=sys.stderr.isatty())
