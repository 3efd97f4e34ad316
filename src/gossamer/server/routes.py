"""The endpoints."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

import gossamer
from gossamer.errors import RequestError
from gossamer.server.answers import ChatAnswers, CompletionAnswers
from gossamer.server.errors import ApiError, JsonResponse
from gossamer.server.frontend import Frontend
from gossamer.server.schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from gossamer.server.stream import reply

__all__ = ["router"]

router = APIRouter()


@router.post("/v1/completions", response_model=None)
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Continues one prompt or several."""
    frontend = _frontend(request)
    frontend.check_model(body.model)
    engine, prompts = frontend.engine, body.prompts()
    params = body.params(engine)
    if engine.tokenizer is None and (params.stop or any(isinstance(prompt, str) for prompt in prompts)):
        raise ApiError(400, "the model has no tokenizer: give token ids, and no stop strings", param="prompt")

    echo: list[str] = []

    def encode() -> list[tuple[int, ...]]:
        if body.echo:
            echo.extend(
                prompt if isinstance(prompt, str) else _decode(frontend, prompt) for prompt in prompts
            )
        return [engine.encode(prompt, add_special_tokens=body.add_special_tokens) for prompt in prompts]

    ticket = await frontend.open(
        encode,
        len(prompts),
        params,
        priority=body.priority or 0,
        tenant=body.user or "",
        cache_salt=body.cache_salt or "",
    )
    answers = CompletionAnswers(ticket, frontend.model, engine.tokenizer, echo or None, body)
    return await reply(request, frontend, ticket, answers, stream=bool(body.stream), usage=body.include_usage)


@router.post("/v1/chat/completions", response_model=None)
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    """Answers a conversation."""
    frontend = _frontend(request)
    frontend.check_model(body.model)
    engine = frontend.engine
    params, tools = body.params(engine), body.callable_tools
    try:
        ticket = await frontend.open(
            lambda: [body.encode(engine)],
            1,
            params,
            priority=body.priority or 0,
            tenant=body.user or "",
            cache_salt=body.cache_salt or "",
        )
    except RequestError as error:
        raise error if tools is None else tools.blame(error) from None
    answers = ChatAnswers(ticket, frontend.model, engine.tokenizer, tools)
    return await reply(request, frontend, ticket, answers, stream=bool(body.stream), usage=body.include_usage)


@router.get("/v1/models", response_model=None)
async def models(request: Request) -> Response:
    """The one model that is served."""
    return JsonResponse({"object": "list", "data": [_card(_frontend(request))]})


@router.get("/v1/models/{model:path}", response_model=None)
async def model(request: Request, model: str) -> Response:
    """One model by its name."""
    _frontend(request).check_model(model)
    return JsonResponse(_card(_frontend(request)))


@router.head("/health", response_model=None, include_in_schema=False)
@router.get("/health", response_model=None)
async def health(request: Request) -> Response:
    """200 when requests are taken, else 503."""
    status = _frontend(request).status
    return JsonResponse({"status": status}, 200 if status == "ready" else 503)


@router.get("/metrics", response_model=None)
async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    shown = _frontend(request).metrics
    return Response(shown.text(), headers={"Content-Type": shown.content_type})


@router.get("/version", response_model=None)
async def version() -> Response:
    """The package's version."""
    return JsonResponse({"version": gossamer.__version__})


@router.post("/tokenize", response_model=None)
async def tokenize(request: Request, body: TokenizeRequest) -> Response:
    """The token ids of a prompt or a conversation."""
    frontend = _frontend(request)
    frontend.check_model(body.model)
    engine = frontend.engine
    if engine.tokenizer is None:
        raise ApiError(400, "the model has no tokenizer")
    ids = await frontend.in_thread(lambda: body.encode(engine))
    answer: dict[str, Any] = {"count": len(ids), "max_model_len": engine.started.max_model_len, "tokens": ids}
    if body.return_token_strs:
        answer["token_strs"] = [engine.tokenizer.token_text(token) for token in ids]
    return JsonResponse(answer)


@router.post("/detokenize", response_model=None)
async def detokenize(request: Request, body: DetokenizeRequest) -> Response:
    """The text of token ids, special tokens spelled out."""
    frontend = _frontend(request)
    frontend.check_model(body.model)
    return JsonResponse({"prompt": await frontend.in_thread(lambda: _decode(frontend, body.tokens))})


def _frontend(request: Request) -> Frontend:
    found: Frontend = request.app.state.frontend
    return found


def _card(frontend: Frontend) -> dict[str, Any]:
    return {
        "id": frontend.model,
        "object": "model",
        "created": frontend.created,
        "owned_by": "gossamer",
        "max_model_len": frontend.engine.started.max_model_len,
    }


def _decode(frontend: Frontend, ids: list[int]) -> str:
    """Text of ids. Raises ApiError without a tokenizer, RequestError for a negative id."""
    tokenizer = frontend.engine.tokenizer
    if tokenizer is None:
        raise ApiError(400, "the model has no tokenizer")
    return tokenizer.decode(ids, skip_special_tokens=False)
