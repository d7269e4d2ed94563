"""Requests larger than any conversation are refused before they fill the memory."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

MAX_BODY_BYTES = 8 << 20  # a context of a million tokens takes less


class SizeLimit:
    """ASGI middleware: answer 413 to a body above ``MAX_BODY_BYTES``, announced or not."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with its whole body, or refuse it as soon as that is too large."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = None if _announces_more(scope) else await _read(receive)
        if body is None:
            message = f"the request is larger than {MAX_BODY_BYTES} bytes"
            error = {"message": message, "type": "invalid_request_error"}
            await JSONResponse({"error": error}, status_code=413)(scope, receive, send)
            return
        first: list[MutableMapping[str, Any]] = [{"type": "http.request", "body": body}]

        async def replay() -> MutableMapping[str, Any]:
            return first.pop() if first else await receive()

        await self.app(scope, replay, send)


def _announces_more(scope: Scope) -> bool:
    announced = dict(scope["headers"]).get(b"content-length", b"0")
    return not announced.isdigit() or int(announced) > MAX_BODY_BYTES


async def _read(receive: Receive) -> bytes | None:
    """Return the body, None as soon as it is too large: chunks come without a length."""
    pieces, num_bytes, is_more = list[bytes](), 0, True
    while is_more:
        message = await receive()
        pieces.append(message.get("body", b""))
        num_bytes += len(pieces[-1])
        if num_bytes > MAX_BODY_BYTES:
            return None
        is_more = message.get("more_body", False)
    return b"".join(pieces)
