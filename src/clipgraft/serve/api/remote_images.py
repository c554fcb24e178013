"""Fetch images from public addresses, and from nowhere else.

A name is resolved once; every address that it has must be public, and the connection goes to the address that
was checked, so that a name which changes its answer between the two gains nothing. Each redirect is checked
as a first request is. Sizes are counted while bytes arrive, and one limit of time holds for everything.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias
from urllib.parse import SplitResult, quote, urljoin, urlsplit

import anyio
import h11

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
_PORTS = {"http": 80, "https": 443}
_AT_ONCE = 32
_CHUNK = 1 << 16
_LONGEST = 8192

# What of IANA's registries is not the public internet. Python's own `is_global` changed between its releases.
_NOT_PUBLIC = tuple(
    ipaddress.ip_network(text)
    for text in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15"),
        *("198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        "168.63.129.16/32",  # Azure's metadata, at an address that looks public
        *(
            "2001::/23",
            "2001:db8::/32",
            "2002::/16",
            "3fff::/20",
        ),  # tunnels, examples: may hold any IPv4 address
    )
)
_PUBLIC_V6 = ipaddress.ip_network("2000::/3")


def is_public(address: Address) -> bool:
    """Whether an address is one of the public internet, of one host."""
    if any(address in network for network in _NOT_PUBLIC if network.version == address.version):
        return False
    return address.version == 4 or address in _PUBLIC_V6


class FetchError(ValueError):
    """An image was not fetched; the message says why, without the address's path."""


@dataclass(frozen=True)
class _Target:
    """Where a URL leads: `host` as the certificate has it, and what is sent."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


class RemoteImages:
    """Fetches the bytes of images from http and https addresses.

    Args:
        hosts: the only hosts to fetch from, where there are any; `*.example.org` is every host under it.
        most_bytes: of an image.
        seconds: for all of an image: names, redirects, bytes.
        redirects: most that are followed.
        allowed: which addresses may be connected to.
        trusted: certificates; the system's by default.
    """

    def __init__(
        self,
        hosts: Sequence[str] = (),
        *,
        most_bytes: int = 32_000_000,
        seconds: float = 10,
        redirects: int = 3,
        allowed: Callable[[Address], bool] = is_public,
        trusted: ssl.SSLContext | None = None,
    ) -> None:
        self.hosts = tuple(host.lower().rstrip(".") for host in hosts)
        self.most_bytes = most_bytes
        self.seconds = seconds
        self.redirects = redirects
        self.allowed = allowed
        self.trusted = trusted or ssl.create_default_context()
        self._places = asyncio.Semaphore(_AT_ONCE)

    async def __call__(self, url: str) -> bytes:
        """Return the bytes at an address.

        Raises:
            FetchError: it may not be fetched, or was not.
        """
        async with self._places:
            try:
                with anyio.fail_after(self.seconds):
                    return await self._follow(url)
            except TimeoutError:
                raise FetchError(f"the image did not arrive within {self.seconds:g} s") from None
            except (OSError, h11.ProtocolError, EOFError):  # ssl.SSLError is an OSError
                raise FetchError("the image's host could not be reached, or broke off") from None

    async def _follow(self, url: str) -> bytes:
        for _ in range(self.redirects + 1):
            target = _target(url)
            self._check_host(target.host)
            answer = await self._get(target)
            if isinstance(answer, bytes):
                return answer
            url = _joined(url, answer)
            if target.scheme == "https" and not url.lower().startswith("https:"):
                raise FetchError("the image's address leads from https to something else")
        raise FetchError(f"the image's address leads on more than {self.redirects} times")

    def _check_host(self, host: str) -> None:
        if self.hosts and not any(_matches(host, pattern) for pattern in self.hosts):
            raise FetchError("the image's host is not one that this server fetches from")

    async def _get(self, target: _Target) -> bytes | str:
        """Return the body, or where the answer leads on to."""
        address = await self._resolve(target)
        secure = self.trusted if target.scheme == "https" else None
        reader, writer = await asyncio.open_connection(
            str(address), target.port, ssl=secure, server_hostname=target.host if secure else None
        )
        try:
            connection = h11.Connection(h11.CLIENT)
            writer.write(_request(connection, target))
            await writer.drain()
            return await self._read(_Events(connection, reader))
        finally:
            writer.transport.abort()

    async def _resolve(self, target: _Target) -> Address:
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise FetchError("the image's host has no address") from None
        addresses = [ipaddress.ip_address(entry[4][0]) for entry in found]
        if not addresses or not all(self.allowed(address) for address in addresses):
            raise FetchError("the image's host is not at a public address")
        return addresses[0]

    async def _read(self, events: _Events) -> bytes | str:
        response = await events.response()
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in response.headers}
        if response.status_code in (301, 302, 303, 307, 308) and "location" in headers:
            return headers["location"]
        if response.status_code != 200:
            raise FetchError(f"the image's host answered {response.status_code}")
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise FetchError("the image's host sent it compressed, which was not asked for")
        length = headers.get("content-length", "0")
        body = bytearray()
        if length.isdigit() and int(length) > self.most_bytes:  # h11 checked that it is a number
            raise self._too_large()
        async for part in events.data():
            body += part
            if len(body) > self.most_bytes:
                raise self._too_large()
        return bytes(body)

    def _too_large(self) -> FetchError:
        return FetchError(f"the image is larger than {self.most_bytes / 1e6:g} MB")


class _Events:
    """What a connection receives, event by event."""

    def __init__(self, connection: h11.Connection, reader: asyncio.StreamReader) -> None:
        self.connection = connection
        self.reader = reader

    async def next(self) -> object:
        while (event := self.connection.next_event()) is h11.NEED_DATA:
            self.connection.receive_data(await self.reader.read(_CHUNK))
        return event

    async def response(self) -> h11.Response:
        event = await self.next()
        while type(event) is h11.InformationalResponse:
            event = await self.next()
        if type(event) is h11.Response:
            return event
        raise EOFError

    async def data(self) -> AsyncIterator[bytes]:
        while type(event := await self.next()) is h11.Data:
            yield bytes(event.data)
        if type(event) is not h11.EndOfMessage:
            raise EOFError


def _joined(url: str, location: str) -> str:
    try:
        return urljoin(url, location)
    except ValueError:
        raise FetchError("the image's address leads on to something that is no address") from None


def _target(url: str) -> _Target:
    if len(url) > _LONGEST or not url.isprintable() or " " in url:
        raise FetchError("the image's address is no address")
    try:
        parts = urlsplit(url)
        port = parts.port
        host = _host(parts)
    except (ValueError, UnicodeError):
        raise FetchError("the image's address is no address") from None
    scheme = parts.scheme.lower()
    if scheme not in _PORTS:
        raise FetchError("the image's address is neither http nor https")
    if parts.username is not None or parts.password is not None:
        raise FetchError("the image's address has a user or a password in it")
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    query = quote(parts.query, safe="/%:@!$&'()*+,;=~-._?")
    return _Target(scheme, host, port or _PORTS[scheme], f"{path}?{query}" if parts.query else path)


def _host(parts: SplitResult) -> str:
    host = (parts.hostname or "").rstrip(".")
    if not host or len(host) > 253:
        raise ValueError("no host")
    return host if ":" in host else host.encode("idna").decode("ascii").lower()


def _matches(host: str, pattern: str) -> bool:
    return host.endswith(pattern[1:]) if pattern.startswith("*.") else host == pattern


def _request(connection: h11.Connection, target: _Target) -> bytes:
    headers = [
        ("Host", target.authority),
        ("User-Agent", "clipgraft"),
        ("Accept", "image/*"),
        ("Accept-Encoding", "identity"),
        ("Connection", "close"),
    ]
    asked = connection.send(h11.Request(method="GET", target=target.path, headers=headers))
    ended = connection.send(h11.EndOfMessage())
    return (asked or b"") + (ended or b"")
