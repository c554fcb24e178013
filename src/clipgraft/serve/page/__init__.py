"""Serve the search page: a few static files that the browser may combine with nothing from elsewhere."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from importlib import resources

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_TYPES = {
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
    "calls.js": "text/javascript; charset=utf-8",
    "classes.js": "text/javascript; charset=utf-8",
    "columns.js": "text/javascript; charset=utf-8",
    "elements.js": "text/javascript; charset=utf-8",
    "enlarged.js": "text/javascript; charset=utf-8",
    "loaded.js": "text/javascript; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "pictures.js": "text/javascript; charset=utf-8",
    "query.js": "text/javascript; charset=utf-8",
    "results.js": "text/javascript; charset=utf-8",
}
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob:",  # thumbnails are fetched with the key, and shown from memory
        "connect-src 'self'",
        "form-action 'none'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    )
)


def page_routes() -> list[Route]:
    """Return the routes of the search page: `/`, and its style and scripts under `/page/`."""
    return [
        Route("/" if name == "index.html" else f"/page/{name}", _endpoint(name), name=f"page-{name}")
        for name in _TYPES
    ]


def _endpoint(name: str) -> Callable[[Request], Awaitable[Response]]:
    """Answer with a file of this folder, or with 304 where the browser has it already."""
    content = resources.files(__package__).joinpath(name).read_bytes()
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {
        "ETag": tag,
        "Cache-Control": "no-cache",  # it asks each time: a new release never meets an old script
        "Content-Security-Policy": CONTENT_SECURITY_POLICY,
        "Cross-Origin-Opener-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }

    async def send(request: Request) -> Response:
        known = (given.strip() for given in request.headers.get("If-None-Match", "").split(","))
        if any(given.removeprefix("W/") == tag or given == "*" for given in known):
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=_TYPES[name])

    return send
