"""Keys that requests must bring: from a file, which is read again when it changes, or the environment."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import time
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from clipgraft.errors import ConfigError
from clipgraft.serve.api.failures import RefusedError, answer

log = logging.getLogger("clipgraft.serve")
ENVIRONMENT = "CLIPGRAFT_API_KEYS"
_LOOK_AGAIN = 1.0  # seconds
_OPEN = frozenset({"/", "/health", "/ready", "/docs", "/openapi.json", "/favicon.ico"})
_OPEN_UNDER = ("/page/", "/docs/")


class Keys:
    """The keys that are accepted; only their hashes are kept.

    Raises:
        ConfigError: the file cannot be read, or has no key.
    """

    def __init__(self, path: Path | None, environment: str = "") -> None:
        self.path = path
        self._fixed = [_digest(key) for key in _stripped(environment.split(","))]
        self._from_file: list[bytes] = []
        self._seen: object = None
        self._looked = float("-inf")
        if path is not None:
            self._read(path)

    def __bool__(self) -> bool:
        return self.path is not None or bool(self._fixed)

    def accept(self, key: bytes) -> bool:
        """Whether a key is one of these, in a time that does not tell how near it came."""
        self._look()
        digest, found = hashlib.sha256(key).digest(), False
        for known in (*self._fixed, *self._from_file):
            found |= hmac.compare_digest(digest, known)
        return found

    def _look(self) -> None:
        """Read the file again if it changed; while it cannot be used, the keys stay what they were."""
        now = time.monotonic()
        if self.path is None or now - self._looked < _LOOK_AGAIN:
            return
        self._looked = now
        try:
            if _state(self.path) != self._seen:
                self._read(self.path)
        except ConfigError as error:
            log.warning("%s; the keys stay what they were", error)

    def _read(self, path: Path) -> None:
        self._seen = _state(path)
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise ConfigError(f"`api_keys`: {path} cannot be read: {_why(error)}") from None
        keys = [line for line in _stripped(lines) if not line.startswith("#")]
        if not keys:
            raise ConfigError(f"`api_keys`: {path} has no key; write one a line")
        self._from_file = [_digest(key) for key in keys]


def _state(path: Path) -> object:
    try:
        found = path.stat()
    except OSError as error:
        return _why(error)
    return found.st_mtime_ns, found.st_size, found.st_ino


def _why(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or "it is not UTF-8"


def _stripped(lines: list[str]) -> list[str]:
    return [line.strip() for line in lines if line.strip()]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def keys_from(path: Path | None) -> Keys:
    """Return the keys of a file and of the environment.

    Raises:
        ConfigError: the file cannot be read, or has no key.
    """
    return Keys(path, os.environ.get(ENVIRONMENT, ""))


class RequireKey:
    """Refuse requests without a key, but for the pages and the probes, which hold nothing secret.

    A key comes as `Authorization: Bearer KEY`, `api-key: KEY` or `x-api-key: KEY`.
    """

    def __init__(self, app: ASGIApp, *, keys: Keys) -> None:
        self.app = app
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _is_open(scope) or self._has_key(Headers(scope=scope)):
            await self.app(scope, receive, send)
            return
        message = "a key is missing or wrong; send `Authorization: Bearer KEY`"
        headers = {"WWW-Authenticate": 'Bearer realm="clipgraft"'}
        await answer(RefusedError(401, message, code="invalid_api_key", headers=headers))(
            scope, receive, send
        )

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = [key] if scheme.lower() == "bearer" else []
        given += [headers[name] for name in ("api-key", "x-api-key") if name in headers]
        return any(self.keys.accept(key.strip().encode("latin-1")) for key in given)


def _is_open(scope: Scope) -> bool:
    path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
    return scope["method"] in ("GET", "HEAD") and (path in _OPEN or path.startswith(_OPEN_UNDER))
