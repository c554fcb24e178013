"""Bodies of requests: JSON alone, of bounded size, that arrives in time, and is read strictly."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import anyio
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clipgraft.serve.api.failures import ClientGoneError, RefusedError, answer

_CLOSE = {"Connection": "close"}  # what is left of a refused body is not read


class BoundedBodies:
    """Read a request's body before its route does, and refuse one that is too large, too slow or not JSON.

    A body that says that it is too large is refused before any of it is read; one that comes in pieces, with
    the piece that is too much. Compressed bodies are refused, since their size is not known.
    """

    def __init__(self, app: ASGIApp, *, most_bytes: int, seconds: float = 60) -> None:
        self.app = app
        self.most_bytes = most_bytes
        self.seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if not _has_body(headers):
            await self.app(scope, receive, send)
            return
        try:
            self._check(headers)
            body = await self._read(receive)
        except RefusedError as refusal:
            await answer(refusal)(scope, receive, send)
            return
        except ClientGoneError:
            return
        await self.app(scope, _replayed(body, receive), send)

    def _check(self, headers: Headers) -> None:
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit():
            raise RefusedError(400, "Content-Length is not a number", headers=_CLOSE)
        if len(length) > 18 or int(length) > self.most_bytes:
            raise self._too_large()
        coding = headers.get("content-encoding", "identity").strip().lower()
        if coding != "identity":
            message = "compressed bodies are not taken; send it without Content-Encoding"
            raise RefusedError(415, message, code="unsupported_media_type")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
            message = "send JSON, with `Content-Type: application/json`; images go in it as data URIs"
            raise RefusedError(415, message, code="unsupported_media_type")

    async def _read(self, receive: Receive) -> bytes:
        parts: list[bytes] = []
        size = 0
        with anyio.move_on_after(self.seconds) as scope:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > self.most_bytes:
                    raise self._too_large()
                if not message.get("more_body", False):
                    break
        if scope.cancelled_caught:
            message_ = f"the body did not arrive within {self.seconds:g} s"
            raise RefusedError(408, message_, code="request_timeout", headers=_CLOSE)
        return b"".join(parts)

    def _too_large(self) -> RefusedError:
        most = f"{self.most_bytes / 1e6:g} MB"
        message = f"the body is larger than the {most} that one request may have; send it in parts"
        return RefusedError(413, message, code="request_too_large", headers=_CLOSE)


def _has_body(headers: Headers) -> bool:
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Give the body once, then what comes after it: the client's leaving."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


class _JsonRequest(Request):
    """A request whose JSON was read already."""

    parsed: Any = None

    async def json(self) -> Any:
        return self.parsed


class JsonRoute(APIRoute):
    """A route whose JSON is refused if it nests too deeply or has numbers that JSON has not."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            read = _JsonRequest(request.scope, request.receive)
            body = await read.body()
            if body:
                read.parsed = _parsed(body)
            return await handle(read)

        return handle_strictly


def _parsed(body: bytes) -> Any:
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise RefusedError(400, f"the body is not JSON: {error}", code="invalid_json") from None
