"""Runs the server in this process until it is told to stop."""

from __future__ import annotations

import asyncio
import copy
import logging
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
import uvicorn.config

from gossamer.checkpoint.chat_template import ChatTemplate
from gossamer.config import EngineConfig
from gossamer.errors import ConfigError
from gossamer.progress import loading_bar
from gossamer.server.app import build_app
from gossamer.server.frontend import Frontend
from gossamer.server.settings import ServerSettings
from gossamer.text_engine import TextEngine

__all__ = ["serve"]

logger = logging.getLogger("gossamer.server")
_FLUSH_SECONDS = 5  # for the last bytes of answers whose engine work is done


def serve(
    engine: EngineConfig,
    settings: ServerSettings,
    *,
    on_ready: Callable[[TextEngine, str], None] | None = None,
    progress: bool = False,
) -> None:
    """Serves until SIGTERM or SIGINT, then lets running requests finish and returns. Main thread only.

    The model is loaded in the engine's own thread, while /health answers 503; on_ready(engine, url) is
    called there once it is (for the memory table). progress: show a loading bar on standard error.
    Raises ConfigError where the port cannot be had and TokenizerError for a chat template that cannot be
    read (both before anything is loaded), and whatever loading raised.
    """
    if settings.chat_template is not None:
        ChatTemplate.load(Path(), {}, settings.chat_template)  # a wrong path must not cost a load
    with _listen(settings) as listener:
        url = _url(listener)

        def load() -> TextEngine:
            with loading_bar(progress) as bar:

                def loaded(done: int, total: int) -> None:
                    if frontend.worker.stopping:
                        raise _Stopped
                    if bar is not None:
                        bar(done, total)

                made = TextEngine.start(engine, chat_template=settings.chat_template, progress=loaded)
            if on_ready is not None:
                on_ready(made, url)
            logger.info("Serving %s on %s/v1", settings.served_model_name or engine.model, url)
            return made

        frontend = Frontend(load, settings.served_model_name or engine.model, settings)
        server = _Server(frontend, url)
        server.run(sockets=[listener])
    error = frontend.worker.error
    if server.failed and error is not None:
        raise error


class _Stopped(Exception):
    """Loading was told to stop."""


class _Server(uvicorn.Server):
    """A uvicorn that answers 503 while the last requests finish, and then returns instead of dying by
    the signal that it got."""

    def __init__(self, frontend: Frontend, url: str) -> None:
        super().__init__(
            uvicorn.Config(
                build_app(frontend),
                http="h11",
                ws="none",
                lifespan="on",
                server_header=False,
                timeout_graceful_shutdown=_FLUSH_SECONDS,
                log_config=_log_config(),
            )
        )
        self._frontend, self._url = frontend, url
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: asyncio.Task[None] | None = None
        self.failed = False
        frontend.worker.on_failure = self._engine_failed

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to answer."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        logger.info("Loading the model (/health says when it is ready); listening on %s", self._url)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins to end; a second Ctrl-C does not wait for anybody."""
        if self._loop is None:
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._stop, sig)

    def _stop(self, sig: int) -> None:
        if self._drain is None:
            self._drain = asyncio.create_task(self._end(self._frontend.settings.shutdown_timeout))
        elif sig == signal.SIGINT:
            self._drain.cancel()
            self._drain = asyncio.create_task(self._end(0))

    async def _end(self, timeout: float) -> None:
        await self._frontend.drain(timeout)
        self.should_exit = True

    def _engine_failed(self) -> None:
        # A model that does not load is the end; an engine that breaks later leaves /health to say so.
        if self._frontend.worker.engine is None:
            self.failed = True
            self.should_exit = True


def _listen(settings: ServerSettings) -> socket.socket:
    """A listening socket. Raises ConfigError, naming the port, where there can be none."""
    host, port = settings.host, settings.port
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        # create_server adds to strerror what this message says better; a wrong host has no errno of its own.
        known = error.errno is not None and not isinstance(error, socket.gaierror)
        why = os.strerror(error.errno or 0) if known else error.strerror or error
        raise ConfigError(
            f"cannot listen on {host} port {port} ({why}); choose another --port or --host"
        ) from None


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _log_config() -> dict[str, Any]:
    """uvicorn's, with everything on standard error and our own messages among it."""
    config = copy.deepcopy(uvicorn.config.LOGGING_CONFIG)
    config["handlers"]["access"]["stream"] = "ext://sys.stderr"
    config["loggers"]["gossamer.server"] = {"handlers": ["default"], "level": "INFO", "propagate": False}
    return config
