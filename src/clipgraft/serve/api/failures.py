"""Errors as answers: every one is JSON in OpenAI's shape, with a line that says what was wrong and where.

No error repeats a text or an image of the request. A fault of ours is a 500 with the id of the request, under
which the log has it; nothing else is a 5xx, but 503 with the seconds after which another try is worth it.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clipgraft.errors import (
    AdapterError,
    BusyError,
    CheckpointError,
    ClipgraftError,
    ClusterError,
    ItemError,
    OverloadedError,
    RetryError,
    TargetError,
    TrainingError,
    UnavailableError,
    UnknownNameError,
    WriteError,
)
from clipgraft.options import nearest
from clipgraft.serve.api.schemas import FORM, ErrorShape
from clipgraft.serve.logs import note_error
from clipgraft.shown import shown_line

log = logging.getLogger("clipgraft.serve")
_POLITE = re.compile("^(Value error, |Input should be |(String|List) should (have|match) )")
_LONGEST = 1000  # characters of a message; a condition of a search may come back in one
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}
_MEANINGS = {
    400: "The request cannot be used; the message says why and where.",
    401: "A key is missing or wrong.",
    403: "The server was started without this.",
    404: "No such model, adapter, folder, row or path.",
    408: "The body did not arrive in time.",
    409: "The adapter is there and cannot be used with this base.",
    413: "The body is larger than the server takes.",
    415: "The body is not JSON.",
    421: "The server does not answer for the name that it was called by.",
    429: "Too much is waiting; `Retry-After` says when to come back.",
    503: "The model is starting, restarting or stopping; `Retry-After` says when to come back.",
}


class RefusedError(Exception):
    """A refusal by the web side itself.

    Attributes:
        status: of HTTP.
        message: one line.
        param: the field that is to blame.
        code: a word for programs.
        headers: to be sent along.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str = "invalid_request",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})


class ClientGoneError(Exception):
    """The client closed the connection; nobody reads an answer."""


@dataclass(frozen=True)
class _Kind:
    status: int
    code: str


_KINDS: tuple[tuple[type[ClipgraftError], _Kind], ...] = (
    (OverloadedError, _Kind(429, "overloaded")),
    (UnavailableError, _Kind(503, "unavailable")),
    (UnknownNameError, _Kind(404, "not_found")),
    (ItemError, _Kind(400, "invalid_item")),
    (AdapterError, _Kind(409, "adapter_unusable")),
    (CheckpointError, _Kind(409, "adapter_unusable")),
    (TargetError, _Kind(409, "adapter_unusable")),
    (WriteError, _Kind(503, "unavailable")),
    (BusyError, _Kind(503, "unavailable")),
    (ClusterError, _Kind(503, "unavailable")),
    (TrainingError, _Kind(503, "unavailable")),
    (ClipgraftError, _Kind(400, "invalid_request")),
)


def retry_headers(seconds: float) -> dict[str, str]:
    """Return the header that says when to come back, in whole seconds from 1 up."""
    return {"Retry-After": str(max(1, math.ceil(seconds)))}


def refusal_of(error: ClipgraftError) -> RefusedError:
    """Turn an error of the library into an answer's status, code, field and headers."""
    kind = next(kind for type_, kind in _KINDS if isinstance(error, type_))
    headers = {}
    if kind.status in (429, 503):
        headers = retry_headers(error.retry_after if isinstance(error, RetryError) else 5)
    param = f"input.{error.index}" if isinstance(error, ItemError) else None
    return RefusedError(kind.status, "; ".join(error.lines), param=param, code=kind.code, headers=headers)


def answer(refusal: RefusedError) -> Response:
    """Write a refusal as a response, and note its code for the log."""
    note_error(refusal.code)
    body = {
        "message": shown_line(refusal.message, _LONGEST),
        "type": _TYPES.get(refusal.status, "invalid_request_error"),
        "param": refusal.param,
        "code": refusal.code,
    }
    return Response(
        to_json({"error": body}), refusal.status, headers=refusal.headers, media_type="application/json"
    )


def statuses(*codes: int) -> dict[int | str, dict[str, Any]]:
    """Describe the errors of a route for the schema: those that every route has, and these."""
    listed = sorted({400, 401, 421, 503, *codes})
    return {code: {"model": ErrorShape, "description": _MEANINGS[code]} for code in listed}


BODY_STATUSES = (404, 408, 409, 413, 415, 429)
"""What a route that asks the model something in a body may answer beside the common ones."""


async def on_refused(request: Request, error: Exception) -> Response:
    """Answer a refusal of the web side."""
    assert isinstance(error, RefusedError)
    return answer(error)


async def on_clipgraft_error(request: Request, error: Exception) -> Response:
    """Answer an error that the library raised on purpose."""
    assert isinstance(error, ClipgraftError)
    return answer(refusal_of(error))


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Answer what the router refuses: no such path, or not with this method."""
    assert isinstance(error, HTTPException)
    status = error.status_code
    path = shown_line(request.url.path, 100)
    messages = {
        404: f"there is no {path} here; /docs lists what there is",
        405: f"{path} does not take {request.method[:20]}; /docs says what it takes",
    }
    message = messages.get(status, str(error.detail))
    code = HTTPStatus(status).phrase.lower().replace(" ", "_")
    return answer(RefusedError(status, message, code=code, headers=error.headers))


async def on_invalid(request: Request, error: Exception) -> Response:
    """Answer a request whose fields cannot be used; the first faults are told."""
    assert isinstance(error, RequestValidationError)
    faults = error.errors()
    told = [_fault(fault) for fault in faults[:3]]
    rest = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
    return answer(RefusedError(400, "; ".join(told) + rest, param=_where(faults[0]) or None))


def _where(fault: Mapping[str, Any]) -> str:
    places = [str(place) for place in fault["loc"][1:] if not str(place).startswith(FORM)]
    return shown_line(".".join(places), 100)


def _fault(fault: Mapping[str, Any]) -> str:
    where, kind = _where(fault), fault["type"]
    if kind == "missing":
        return f"`{where}` is missing" if where else "the body is missing; send JSON"
    if kind == "extra_forbidden":
        return f"`{where}`: there is no such field"
    allowed = _POLITE.sub("", fault["msg"]).partition(" after validation")[0]
    if kind in ("value_error", "item"):
        return f"`{where}`: {allowed}" if where else allowed
    return f"`{where}`: got {_told(fault['input'])}, allowed is {allowed}"


def _told(value: Any) -> str:
    """Describe a value without repeating what may be somebody's text."""
    if isinstance(value, str):
        return f"a text of {len(value):,} characters"
    if isinstance(value, list):
        return f"a list of {len(value):,}"
    if isinstance(value, dict):
        return "an object"
    if value is None:
        return "null"
    return shown_line(str(value), 30)


def did_you_mean(name: str, known: list[str]) -> str:
    """Write the near misses of a name as the end of a message; empty where there are none."""
    close = " or ".join(f"'{shown_line(other, 100)}'" for other in nearest(name, known))
    return f" (did you mean {close}?)" if close else ""


class CatchAll:
    """Turn a fault of ours into a 500 with the request's id, and log it under that id.

    Stands inside `clipgraft.serve.logs.Observed`, which gives the id.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        identity = scope["state"]["request_id"]
        begun = False

        async def sending(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, receive, sending)
        except ClientGoneError:
            return
        except Exception:
            log.exception("request %s failed", identity)
            if begun:
                raise
            message = f"the server failed at this; its log has the reason under request {identity}"
            headers = {"X-Request-ID": identity}
            await answer(RefusedError(500, message, code="internal_error", headers=headers))(
                scope, receive, send
            )
