"""Serve the reference of the routes: the OpenAPI schema, and a page that shows it and sends its examples.

The page needs nothing from elsewhere, and runs under a policy that lets it load nothing from elsewhere.
"""

from __future__ import annotations

import copy
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Any

from fastapi import FastAPI
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from clipgraft.errors import RetryError
from clipgraft.serve.api.asking import base_of, served
from clipgraft.serve.api.examples import BASE_NAME

_FILES = {
    "/docs": ("index.html", "text/html; charset=utf-8"),
    "/docs/reference.css": ("reference.css", "text/css; charset=utf-8"),
    "/docs/reference.js": ("reference.js", "text/javascript; charset=utf-8"),
}
_ERROR = "#/components/schemas/ErrorShape"
_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob:; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def reference_routes(app: FastAPI) -> list[Route]:
    """Return `/docs`, the files of its page, `/openapi.json`, and what stops browsers asking for an icon."""
    schema: list[dict[str, Any]] = []

    async def send_schema(request: Request) -> Response:
        if not schema:
            schema.append(tidied(app.openapi()))
        return Response(to_json(await _with_base(request, schema[0])), media_type="application/json")

    async def send_no_icon(request: Request) -> Response:
        return Response(status_code=204)

    pages = [Route(path, _page(*file), name=path) for path, file in _FILES.items()]
    others = {"/openapi.json": send_schema, "/favicon.ico": send_no_icon}
    return [*pages, *(Route(path, send, name=path) for path, send in others.items())]


def _page(name: str, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    content = resources.files(__package__).joinpath(name).read_bytes()

    async def send(request: Request) -> Response:
        return Response(content, headers=_HEADERS, media_type=media_type)

    return send


def tidied(schema: dict[str, Any]) -> dict[str, Any]:
    """Return FastAPI's schema without the answers that this server never gives, and with its keys."""
    made = copy.deepcopy(schema)
    for operations in made["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            for status, response in operation["responses"].items():
                if status >= "400":  # also of a route that answers with plain text
                    response["content"] = {"application/json": {"schema": {"$ref": _ERROR}}}
            operation["security"] = [{}, {"bearer": []}, {"header": []}]
    components = made["components"]
    for unused in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(unused, None)
    components["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    return made


async def _with_base(request: Request, schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema with the served base's name in its examples, once that is known."""
    shared = served(request)
    if shared.base is None and shared.backend.state != "ready":
        return schema
    try:
        base = (await base_of(request)).base
    except RetryError:
        return schema
    named: dict[str, Any] = _renamed(schema, base)
    return named


def _renamed(value: Any, base: str) -> Any:
    if isinstance(value, list):
        return [_renamed(item, base) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: base if key == "model" and item == BASE_NAME else _renamed(item, base)
        for key, item in value.items()
    }
