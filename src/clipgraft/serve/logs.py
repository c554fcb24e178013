"""One record a request: its id, route, status and time, for the log and for metrics.

A record never has a key, a text, an image, or the query of an address; of a path it has the route's pattern,
since what a client puts there may be anything.
"""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, Literal, Protocol

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clipgraft.shown import shown_line

log = logging.getLogger("clipgraft.serve.requests")
REQUEST_ID = "X-Request-ID"
UNMATCHED = "(none)"
"""The route of a request whose path no route matches."""
_SANE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/+=@-]{0,127}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_LONGEST = 100  # characters of an adapter's name
# What probes and the page ask for again and again; a 503 follows a change of state, which the log has.
_POLLED = frozenset({"/health", "/ready", "/metrics", "/describe", "/statistics"})
_UNREMARKABLE = frozenset({200, 503})


@dataclass
class RequestRecord:
    """What is known of a request.

    Attributes:
        identity: from `X-Request-ID` where that is sane, else made; sent back in the same header.
        method: of HTTP; `OTHER` for unusual ones.
        route: the pattern of its path, such as `/v1/models/{model}`.
        status: of the response; 499 where the client left before there was one.
        seconds: from the first line to the last byte.
        items: texts and images that were answered for, of all that was asked of the model.
        tokens: that they had.
        adapter: that answered.
        error: the code of the error that was answered.
    """

    identity: str
    method: str = ""
    route: str = UNMATCHED
    status: int = 499
    seconds: float = 0.0
    items: int = 0
    tokens: int = 0
    adapter: str | None = None
    error: str | None = None
    _begun: float = field(default_factory=time.perf_counter, repr=False)

    def end(self, scope: Scope) -> None:
        """Note the time, and which route the request took."""
        self.seconds = time.perf_counter() - self._begun
        method = scope["method"]
        self.method = method if method in _METHODS else "OTHER"
        self.route = str(getattr(scope.get("route"), "path", UNMATCHED))


class Sink(Protocol):
    """Something that takes the records of requests."""

    def begun(self) -> None:
        """A request has come."""

    def ended(self, record: RequestRecord) -> None:
        """It was answered."""


_current: ContextVar[RequestRecord | None] = ContextVar("clipgraft_request", default=None)


def note_answer(message: Any, answer: Any) -> None:
    """Note what a request was answered; call it where a message is answered for a request."""
    record = _current.get()
    if record is None:
        return
    tokens = getattr(answer, "tokens", ())
    items = getattr(message, "items", None)
    record.tokens += sum(tokens)
    record.items += len(tokens) if items is None else len(items)
    if (using := getattr(message, "using", None)) is not None and using.adapter is not None:
        record.adapter = using.adapter


def note_error(code: str) -> None:
    """Note the code of the error that a request was answered with."""
    if (record := _current.get()) is not None:
        record.error = code


class Observed:
    """Middleware that gives requests their id and their record; it should be the outermost."""

    def __init__(self, app: ASGIApp, sinks: Sequence[Sink]) -> None:
        self._app = app
        self._sinks = sinks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord(_identity(Headers(scope=scope).get(REQUEST_ID)))
        scope.setdefault("state", {})["request_id"] = record.identity

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = record.identity
            await send(message)

        for sink in self._sinks:
            sink.begun()
        token = _current.set(record)
        try:
            await self._app(scope, receive, sending)
        except Exception:
            record.status = 500
            raise
        finally:
            _current.reset(token)
            record.end(scope)
            for sink in self._sinks:
                sink.ended(record)


def _identity(given: str | None) -> str:
    return given if given is not None and _SANE.fullmatch(given) else uuid.uuid4().hex


class RequestLog:
    """Writes a line for each request to the logger `clipgraft.serve.requests`; for polls, at level DEBUG."""

    def __init__(self, form: Literal["text", "json"] = "text") -> None:
        self._write = as_json if form == "json" else as_text

    def begun(self) -> None:
        """Nothing is said of requests before they end."""

    def ended(self, record: RequestRecord) -> None:
        """Write the line."""
        polled = record.route in _POLLED and record.status in _UNREMARKABLE
        level = logging.DEBUG if polled else logging.INFO
        if log.isEnabledFor(level):
            log.log(level, "%s", self._write(record))


def as_json(record: RequestRecord) -> str:
    """Write a record as one line of JSON; what a request did not have is left out."""
    fields = {
        "time": _now(),
        "id": record.identity,
        "method": record.method,
        "route": record.route,
        "status": record.status,
        "ms": round(record.seconds * 1000, 1),
        "items": record.items or None,
        "tokens": record.tokens or None,
        "adapter": record.adapter,
        "error": record.error,
    }
    return json.dumps({name: value for name, value in fields.items() if value is not None})


def as_text(record: RequestRecord) -> str:
    """Write a record as one line of text."""
    parts = [_now(), str(record.status), record.method, record.route, f"{record.seconds * 1000:.1f} ms"]
    if record.items:
        parts.append(f"items={record.items}")
    if record.tokens:
        parts.append(f"tokens={record.tokens}")
    if record.adapter is not None:
        parts.append(f"adapter={shown_line(record.adapter, _LONGEST)}")
    if record.error is not None:
        parts.append(f"error={record.error}")
    return " ".join([*parts, f"id={record.identity}"])


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
