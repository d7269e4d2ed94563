"""A body that is too large is refused, however it is announced; others arrive whole."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from trainer.inference import request_size
from trainer.inference.request_size import SizeLimit


def send(chunks: list[bytes], announced: bytes | None) -> tuple[int | None, bytes]:
    """Send a request through the middleware; return the status of a refusal, and what arrived."""
    arrived, statuses = bytearray(), list[int]()
    parts = [{"type": "http.request", "body": c, "more_body": True} for c in chunks]
    left = iter([*parts, {"type": "http.request", "body": b"", "more_body": False}])

    async def app(scope: Any, receive: Any, send: Any) -> None:
        arrived.extend((await receive())["body"])

    async def receive() -> Any:
        return next(left)

    async def answer(message: Any) -> None:
        statuses.extend([message["status"]] if "status" in message else [])

    headers = [] if announced is None else [(b"content-length", announced)]
    asyncio.run(SizeLimit(app)({"type": "http", "headers": headers}, receive, answer))
    return next(iter(statuses), None), bytes(arrived)


@pytest.mark.parametrize(
    ("chunks", "announced", "expected"),
    [
        ([b"abc", b"de"], b"5", (None, b"abcde")),
        ([b"abc", b"de"], None, (None, b"abcde")),
        ([], b"9", (413, b"")),
        ([b"abc"], b"many", (413, b"")),
        ([b"abcde", b"fghi"], None, (413, b"")),
    ],
)
def test_a_body_is_whole_or_refused(
    chunks: list[bytes],
    announced: bytes | None,
    expected: tuple[int | None, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(request_size, "MAX_BODY_BYTES", 8)
    assert send(chunks, announced) == expected
