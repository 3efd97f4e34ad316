"""The web application."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

import gossamer
from gossamer.checkpoint.chat_template import ChatTemplate
from gossamer.server.errors import install_handlers
from gossamer.server.frontend import Frontend
from gossamer.server.gate import Gate
from gossamer.server.routes import router
from gossamer.server.settings import ServerSettings
from gossamer.text_engine import TextEngine

__all__ = ["build_app", "create_app"]

_STEP_SECONDS = 30.0  # the longest that the engine's thread may take to end; it ends after its step


def create_app(engine: TextEngine, settings: ServerSettings) -> FastAPI:
    """The application that serves a started engine; whoever runs it does so on one event loop, once.

    From its start-up on the engine belongs to the application's thread. settings.chat_template replaces
    the engine's. Raises TokenizerError for a template that cannot be read.
    """
    if settings.chat_template is not None:
        special = engine.tokenizer.special_tokens if engine.tokenizer is not None else {}
        engine.chat_template = ChatTemplate.load(engine.started.directory, special, settings.chat_template)
    name = settings.served_model_name or engine.started.config.model
    return build_app(Frontend(lambda: engine, name, settings))


def build_app(frontend: Frontend) -> FastAPI:
    """The application on a frontend; its start-up starts the engine's thread, its shutdown ends it."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        frontend.worker.start()
        yield
        frontend.worker.stop()
        await asyncio.to_thread(frontend.worker.join, _STEP_SECONDS)

    # The pages of /docs load scripts from elsewhere.
    app = FastAPI(
        title="Gossamer",
        version=gossamer.__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.frontend = frontend
    install_handlers(app)
    app.include_router(router)
    app.add_middleware(Gate, frontend=frontend)
    return app
