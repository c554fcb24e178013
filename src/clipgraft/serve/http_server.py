"""The HTTP server of a web process. Importing this takes a second, in which the model's process starts."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import uvicorn

from clipgraft.serve.api import create_app
from clipgraft.serve.api.app import MakeBackend
from clipgraft.serve.args import WebArgs
from clipgraft.serve.metrics import Metrics

_SPARE = 2  # seconds that answers at the end of a drain have to be written


class HttpServer(uvicorn.Server):  # type: ignore[misc]
    """Leaves signals to whoever runs it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle none."""
        yield


def http_server(make_backend: MakeBackend, web: WebArgs, metrics: Metrics) -> HttpServer:
    """Build a server that listens on nothing yet.

    Raises:
        ConfigError: the file of keys cannot be used, or options do not go together.
    """
    return HttpServer(
        uvicorn.Config(
            create_app(make_backend, web, metrics=metrics),
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            ws="none",
            timeout_keep_alive=30,
            timeout_graceful_shutdown=math.ceil(web.drain_seconds) + _SPARE,
        )
    )
