"""Build the server's ASGI application."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TypeAlias

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from clipgraft import __version__
from clipgraft.errors import ClipgraftError, ConfigError
from clipgraft.serve.api import classify, embeddings, models, rank, search, status
from clipgraft.serve.api.asking import Fetcher, Served
from clipgraft.serve.api.bodies import BoundedBodies
from clipgraft.serve.api.failures import (
    CatchAll,
    RefusedError,
    on_clipgraft_error,
    on_http_exception,
    on_invalid,
    on_refused,
)
from clipgraft.serve.api.hosts import KnownHosts, known_hosts
from clipgraft.serve.api.keys import RequireKey, keys_from
from clipgraft.serve.api.reference import reference_routes
from clipgraft.serve.api.remote_images import RemoteImages
from clipgraft.serve.args import WebArgs
from clipgraft.serve.logs import Observed, RequestLog
from clipgraft.serve.messages import Backend
from clipgraft.serve.metrics import Metrics
from clipgraft.serve.page import page_routes

_PUBLISHED_EVERY = 1.0  # seconds
MakeBackend: TypeAlias = Callable[[], Backend | Awaitable[Backend]]
_ROUTERS = (
    embeddings.router,
    models.router,
    classify.router,
    rank.router,
    search.router,
    status.router,
)


def create_app(
    make_backend: MakeBackend,
    web: WebArgs | None = None,
    *,
    metrics: Metrics | None = None,
    fetch: Fetcher | None = None,
) -> FastAPI:
    """Build an application that answers over HTTP what a backend answers.

    Args:
        make_backend: called when the application starts, in its event loop; the application closes what it
            returns, or what it returns an awaitable of, when it stops.
        web: the server's options.
        metrics: what counts the requests; of a server of several processes, one that shares its counts.
        fetch: fetches images from addresses, in place of one that reaches public addresses alone and only
            with `web.allow_urls`.

    Raises:
        ConfigError: the file of keys cannot be used, or options do not go together.
    """
    web = web or WebArgs()
    keys = keys_from(web.api_keys)
    fetch = fetch or _fetcher(web)
    metrics = metrics or Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        made = make_backend()
        backend = await made if inspect.isawaitable(made) else made
        app.state.served = Served(web, backend, metrics, fetch)
        publishing = asyncio.create_task(_publish(metrics, backend))
        try:
            yield
        finally:
            publishing.cancel()
            await backend.close()

    app = FastAPI(title="clipgraft", version=__version__, lifespan=lifespan, openapi_url=None)
    for router in _ROUTERS:
        app.include_router(router)
    for page in [*reference_routes(app), *(page_routes() if web.page else [])]:
        app.add_api_route(page.path, page.endpoint, methods=["GET", "HEAD"], include_in_schema=False)
    app.add_exception_handler(RefusedError, on_refused)
    app.add_exception_handler(ClipgraftError, on_clipgraft_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http_exception)
    # The last one added is the outermost.
    app.add_middleware(BoundedBodies, most_bytes=_bytes(web.max_body_mb))
    if keys:
        app.add_middleware(RequireKey, keys=keys)
    if web.cors:
        _allow_origins(app, web.cors)
    if (names := known_hosts(web, has_keys=bool(keys))) is not None:
        app.add_middleware(KnownHosts, names=names)
    app.add_middleware(CatchAll)
    app.add_middleware(Observed, sinks=(metrics, RequestLog(web.log_format)))
    return app


async def _publish(metrics: Metrics, backend: Backend) -> None:
    """Tell the other processes of a server what this one counted."""
    while True:
        await metrics.publish(backend)
        await asyncio.sleep(_PUBLISHED_EVERY)


def _bytes(megabytes: float) -> int:
    return max(1, round(megabytes * 1e6))


def _fetcher(web: WebArgs) -> Fetcher | None:
    if web.allow_urls:
        return RemoteImages(web.url_hosts, most_bytes=_bytes(web.max_body_mb))
    if web.url_hosts:
        raise ConfigError("`url_hosts` has no effect without `allow_urls`; give both, or neither")
    return None


def _allow_origins(app: FastAPI, origins: Sequence[str]) -> None:
    app.add_middleware(
        CORSMiddleware,
        allow_origins=list(origins),
        allow_methods=["GET", "POST"],
        allow_headers=["Authorization", "api-key", "x-api-key", "Content-Type", "X-Request-ID"],
        expose_headers=["Retry-After", "X-Request-ID"],
        max_age=3600,
    )
