"""transformers' OpenAI-compatible server with our model behind it and a token before it.

Routes, schemas, streaming and the parsing of tool calls are those of ``transformers serve``. What
differs: one model, loaded beforehand; answers come from ``ChatModel``, so that stop texts, seeds
and padding rows are treated as in ``kuroshio chat``; what a request asks for in vain is refused.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException as StarletteHTTPException
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import BaseHandler

from trainer.inference.chat_model import ChatModel
from trainer.inference.decoding import Decoding
from trainer.inference.request_size import SizeLimit
from trainer.inference.requests import RequestError, check_messages, check_prompt, read_decoding
from trainer.inference.served_answers import OneThread, Wanted

# Of transformers' routes. The others load and unload models, or answer in ways not tested here.
ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health")
OPEN_ROUTES = ("/health",)  # tells nothing


def build_app(chat_model: ChatModel, defaults: Decoding, token: str) -> FastAPI:
    """Return the application that serves ``chat_model``.

    Args:
        chat_model: the one model.
        defaults: decoding parameters that a request may leave out.
        token: clients send it as ``Authorization: Bearer TOKEN``.
    """
    manager, state = OneModel(chat_model), OneThread(chat_model)
    app = build_server(
        manager,
        ChatHandler(manager, state, chat_model, defaults),
        completion_handler=TextHandler(manager, state, chat_model, defaults),
        response_handler=None,
        transcription_handler=None,
        systemone_handler=None,
        generation_state=state,
    )
    app.router.routes[:] = [route for route in app.router.routes if _path(route) in ROUTES]
    app.add_exception_handler(StarletteHTTPException, _show_http_error)
    app.add_exception_handler(RequestError, _show_bad_request)
    app.add_exception_handler(RequestValidationError, _show_bad_request)

    app.add_middleware(SizeLimit)

    @app.middleware("http")  # the outer one: strangers' requests are not read at all
    async def check_token(
        request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        """Let nobody in without the token."""
        given = request.headers.get("authorization", "")
        right = hmac.compare_digest(given.encode(), f"Bearer {token}".encode())
        if not right and request.url.path not in OPEN_ROUTES:
            return _error(401, "the API key is not this server's token")
        return await call_next(request)

    return app


def _path(route: Any) -> str:
    return str(getattr(route, "path", ""))  # some kinds of route have none


def _error(status: int, message: str) -> JSONResponse:
    """Return an error as OpenAI's clients read it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    content = {"error": {"message": message, "type": kind, "code": None, "param": None}}
    return JSONResponse(content, status_code=status)


async def _show_http_error(request: Request, error: Any) -> JSONResponse:
    return _error(error.status_code, str(error.detail))


async def _show_bad_request(request: Request, error: Any) -> JSONResponse:
    return _error(400, str(error))


class OneModel(ModelManager):
    """Has one model, already loaded."""

    def __init__(self, chat_model: ChatModel) -> None:
        # Nothing of the parent's: it would load a model from the network or its cache.
        self.loaded_models: dict[str, Any] = {}
        self.force_model = chat_model.name
        self._started = int(time.time())

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        """Return the list that /v1/models shows."""
        model = {"id": self.force_model, "object": "model", "owned_by": "kuroshio"}
        return [{**model, "created": self._started}]


class Checked(BaseHandler):
    """What both handlers do otherwise than transformers': check, and read decoding parameters."""

    def __init__(
        self, manager: OneModel, state: OneThread, chat_model: ChatModel, defaults: Decoding
    ) -> None:
        super().__init__(manager, state)
        self.chat_model, self.defaults = chat_model, defaults

    def _validate_request(self, body: dict[str, Any]) -> None:
        read_decoding(body, self.defaults)

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, Any, Any]:
        name = self.chat_model.name
        if body.get("model") not in (None, name):
            raise HTTPException(404, f"model {body['model']!r} is not served here, {name!r} is")
        return name, self.chat_model.model, self.chat_model.tokenizer

    def _build_generation_config(
        self, body: dict[str, Any], model_generation_config: Any, use_cb: bool = False
    ) -> Wanted:
        return Wanted(read_decoding(body, self.defaults))


class ChatHandler(Checked, ChatCompletionHandler):
    """Answers conversations."""

    def _validate_request(self, body: dict[str, Any]) -> None:
        super()._validate_request(body)
        check_messages(body, self.chat_model)


class TextHandler(Checked, CompletionHandler):
    """Continues texts."""

    def _validate_request(self, body: dict[str, Any]) -> None:
        super()._validate_request(body)
        check_prompt(body, self.chat_model)
