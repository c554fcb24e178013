"""Host names that a server answers for, so that no page of a stranger reads it through a user's browser.

A page can let its own name point to 127.0.0.1 once it is loaded (DNS rebinding). The browser then takes a
server there for the page's own, and lets it read all answers; what tells is that name in the Host header.
"""

from __future__ import annotations

import ipaddress
import socket

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from clipgraft.serve.api.failures import RefusedError, answer
from clipgraft.serve.args import WebArgs
from clipgraft.shown import shown_line

_ALL = "*"
_LONGEST = 100  # characters of a name that are repeated


class KnownHosts:
    """Refuse requests whose Host header has another name than these, and is no IP address."""

    def __init__(self, app: ASGIApp, *, names: frozenset[str]) -> None:
        self.app = app
        self.names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_known(Headers(scope=scope).get("host")):
            await self.app(scope, receive, send)
            return
        name = shown_line(_name(Headers(scope=scope)["host"]), _LONGEST)
        message = (
            f"this server does not answer for the host '{name}': ask it by its IP address, "
            f"or start it with --allowed-hosts {name}"
        )
        await answer(RefusedError(421, message, code="unknown_host"))(scope, receive, send)

    def _is_known(self, host: str | None) -> bool:
        if host is None:  # probes of HTTP/1.0 send none; browsers always do
            return True
        name = _name(host)
        return name in self.names or _is_address(name)


def known_hosts(web: WebArgs, *, has_keys: bool) -> frozenset[str] | None:
    """Return the names that a server answers for; None for any.

    Without `web.allowed_hosts` only a server that this machine alone reaches, and that asks for no key, is
    particular: others cannot know by which names they are reached, or do not answer strangers.
    """
    if _ALL in web.allowed_hosts:
        return None
    if not web.allowed_hosts and (has_keys or web.uds is not None or not _is_loopback(web.host)):
        return None
    return frozenset(_name(host) for host in ("localhost", web.host, *web.allowed_hosts))


def _name(host: str) -> str:
    """The name or address in a Host header, without its port."""
    bare = host.strip().lower()
    if bare.startswith("["):
        return bare[1:].partition("]")[0]
    return (bare.partition(":")[0] if bare.count(":") == 1 else bare).rstrip(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]
    except (OSError, UnicodeError):  # told by who listens
        return False
    return ipaddress.ip_address(str(found).partition("%")[0]).is_loopback
