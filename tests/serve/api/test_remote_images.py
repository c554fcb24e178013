"""Images from addresses: public ones alone, whatever a name resolves to or an answer leads to."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from clipgraft.errors import ConfigError
from clipgraft.serve.api import create_app
from clipgraft.serve.api.remote_images import FetchError, RemoteImages, is_public
from clipgraft.serve.args import WebArgs
from scripted_backend import ScriptedBackend
from served_app import running

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Type: text/html\r\n\r\nimage"
Send = Callable[[socket.socket, bytes], None]


class Host:
    """A server on this machine that sends what a test says for each path; `seen` has the requests."""

    def __init__(self, answers: dict[str, bytes | Send], secure: ssl.SSLContext | None = None) -> None:
        self.answers = answers
        self.seen: list[bytes] = []
        self._secure = secure
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            if self._secure is not None:
                connection = self._secure.wrap_socket(connection, server_side=True)
            request = connection.recv(65536)
            self.seen.append(request)
            answer = self.answers[request.split(b" ")[1].decode()]
            if isinstance(answer, bytes):
                connection.sendall(answer)
            else:
                answer(connection, request)
        except (OSError, IndexError, KeyError):
            pass
        finally:
            connection.close()

    def close(self) -> None:
        self._listening.close()


@contextmanager
def host(answers: dict[str, bytes | Send], secure: ssl.SSLContext | None = None) -> Iterator[Host]:
    """Run a host."""
    made = Host(answers, secure)
    try:
        yield made
    finally:
        made.close()


def fetch(url: str, **options: Any) -> bytes:
    """Fetch with addresses of this machine allowed, unless a test says otherwise."""

    async def run() -> bytes:
        return await RemoteImages(**{"allowed": lambda address: True, "seconds": 60, **options})(url)

    return asyncio.run(run())


def leading_to(location: str, status: int = 302) -> bytes:
    """Write an answer that leads on."""
    return f"HTTP/1.1 {status} Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.9.9.9", "0.0.0.0", "10.1.2.3", "172.16.0.1", "172.31.255.255", "192.168.1.1"),
        *("169.254.169.254", "100.64.0.1", "100.100.100.200", "192.0.0.1", "192.0.2.5", "198.18.0.1"),
        *("198.51.100.7", "203.0.113.9", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255"),
        *("168.63.129.16", "::", "::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1", "fe80::1"),
        *("fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1", "fec0::1", "64:ff9b::7f00:1", "2001::1"),
        *("2001:db8::1", "2002:7f00:1::", "64:ff9b:1::1", "100::1", "3fff::1", "5f00::1"),
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    """Requests could reach what only this machine or its network should: metadata, databases, routers."""
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "93.184.216.34", "172.32.0.1", "2606:4700::1", "2a00:1450::1"]
)
def test_public_addresses(address: str) -> None:
    """No image could be fetched at all."""
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "name",
    [
        *("127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "2130706433", "0x7f.1"),
        *("0177.0.0.1", "127.1", "localhost.", "169.254.169.254", "①②⑦.0.0.1", "[fe80::1]", "127.0.0.1."),
    ],
)
def test_this_machine_by_any_name(name: str) -> None:
    """A clever way to write an address would get around the check."""
    with host({"/": OK}) as made:
        with pytest.raises(FetchError, match=r"no address|not at a public address"):
            fetch(f"http://{name}:{made.port}/", allowed=is_public)
        assert made.seen == []


def test_names_are_resolved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is public when it is checked, and this machine when it is connected to, would get in."""
    asked = []

    async def getaddrinfo(self: object, name: str, port: int, **options: Any) -> list[Any]:
        asked.append(name)
        address = "93.184.216.34" if len(asked) == 1 else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    connected = []

    async def open_connection(address: str, port: int, **options: Any) -> Any:
        connected.append((address, port, options["server_hostname"]))
        raise ConnectionRefusedError

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(asyncio, "open_connection", open_connection)
    with pytest.raises(FetchError, match="could not be reached"):
        fetch("https://rebinding.example/a.png", allowed=is_public)
    assert asked == ["rebinding.example"]
    assert connected == [("93.184.216.34", 443, "rebinding.example")]


def test_one_private_address_among_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name with a public and a private address would be connected to by luck."""

    async def getaddrinfo(self: object, name: str, port: int, **options: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in ("93.184.216.34", "10.0.0.1")]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)
    with pytest.raises(FetchError, match="not at a public address"):
        fetch("http://both.example/", allowed=is_public)


def test_fetches_an_image() -> None:
    """An image whose server names another type, or sends it in pieces, could not be used."""
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nim\r\n3\r\nage\r\n0\r\n\r\n"
    until_closed = b"HTTP/1.0 200 OK\r\n\r\nimage"
    early = b"HTTP/1.1 103 Early Hints\r\n\r\n" + OK
    with host({"/a?b=%C3%A9&c=1": OK, "/c": chunked, "/u": until_closed, "/e": early}) as made:
        root = f"http://127.0.0.1:{made.port}"
        assert [fetch(root + path) for path in ("/a?b=é&c=1", "/c", "/u", "/e")] == [b"image"] * 4
        assert f"Host: 127.0.0.1:{made.port}\r\n".encode() in made.seen[0]
        assert b"Accept-Encoding: identity" in made.seen[0]


def test_redirects() -> None:
    """Images behind a short address could not be used, or a circle would go on for ever."""
    with host({"/1": leading_to("/2", 301), "/2": leading_to("3?x=1", 307), "/3?x=1": OK}) as made:
        assert fetch(f"http://127.0.0.1:{made.port}/1") == b"image"
    with host({"/": leading_to("/")}) as made:
        with pytest.raises(FetchError, match="more than 3 times"):
            fetch(f"http://127.0.0.1:{made.port}/")
        assert len(made.seen) == 4


def test_redirects_are_checked() -> None:
    """A public page could lead the server to an address inside."""
    with host({"/": OK}) as inside:
        for location in (f"http://127.0.0.2:{inside.port}/", f"//127.0.0.2:{inside.port}/", "file:///etc/passwd",
                         "ftp://127.0.0.1/", "http://[", f"http://a:b@127.0.0.1:{inside.port}/"):  # fmt: skip
            with host({"/": leading_to(location)}) as outside, pytest.raises(FetchError):
                # 127.0.0.1 stands for the public internet, and 127.0.0.2 for a private address.
                fetch(f"http://127.0.0.1:{outside.port}/", allowed=lambda a: str(a) == "127.0.0.1")
        assert inside.seen == []


def test_hosts_that_are_allowed() -> None:
    """The list of hosts would be got around by a redirect, by case, or by a name that ends alike."""
    with host({"/": OK, "/on": leading_to("http://127.0.0.1:1/")}) as made:
        url = f"http://LOCALHOST:{made.port}/"
        assert fetch(url, hosts=("localhost",)) == b"image"
        assert fetch(url, hosts=("other.example", "localhost")) == b"image"
        for hosts in (("example.org",), ("ocalhost",), ("*.localhost",)):
            with pytest.raises(FetchError, match="not one that this server fetches from"):
                fetch(url, hosts=hosts)
        with pytest.raises(FetchError, match="not one that"):
            fetch(url + "on", hosts=("localhost",))


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.org/a",
        "file:///etc/passwd",
        "http:///a",
        "http://",
        "http://a b/",
        "http://exa\nmple.org/",
        "http://user:pass@example.org/",
        "http://example.org:99999/",
        "http://[::1/",
        "http://" + "a" * 300 + ".org/",
        "http://example.org/" + "a" * 9000,
        "http://.../",
        "http://xn--/",
    ],
)
def test_no_addresses(url: str) -> None:
    """A strange address would be a fault of ours, or be understood in two ways."""
    with pytest.raises(FetchError):
        fetch(url)


def endless(connection: socket.socket, request: bytes) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        connection.sendall(b"a" * 65536)


def dripping(connection: socket.socket, request: bytes) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    while True:
        connection.sendall(b"a")
        time.sleep(0.05)


def silent(connection: socket.socket, request: bytes) -> None:
    time.sleep(3)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000001\r\n\r\n", "larger than 1 MB"),
        (endless, "larger than 1 MB"),
        (dripping, "within 0.5 s"),
        (silent, "within 0.5 s"),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", "answered 404"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", "answered 204"),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 1\r\n\r\na", "compressed"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort", "broke off"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nshort", "broke off"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"a" * 200_000, "broke off"),
        (b"SSH-2.0-OpenSSH\r\n", "broke off"),
        (b"", "broke off"),
    ],
)
def test_answers_that_cannot_be_used(answer: bytes | Send, words: str) -> None:
    """One host could fill the memory or hold a request for ever."""
    seconds = 0.5 if "within" in words else 60
    with host({"/": answer}) as made, pytest.raises(FetchError, match=words):
        fetch(f"http://127.0.0.1:{made.port}/", most_bytes=1_000_000, seconds=seconds)


def test_certificates_are_checked_by_name(tmp_path: Path) -> None:
    """Whoever sits on the line could send another image; or no https image could be fetched at all."""
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate,
         "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"],
        check=True, capture_output=True,
    )  # fmt: skip
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    theirs.load_cert_chain(certificate, key)
    trusted = ssl.create_default_context(cafile=str(certificate))
    with host({"/": OK, "/down": leading_to("http://localhost/")}, theirs) as made:
        assert fetch(f"https://localhost:{made.port}/", trusted=trusted) == b"image"
        with pytest.raises(FetchError, match="could not be reached"):
            fetch(f"https://127.0.0.1:{made.port}/", trusted=trusted)
        with pytest.raises(FetchError, match="could not be reached"):
            fetch(f"https://localhost:{made.port}/")
        with pytest.raises(FetchError, match="from https to something else"):
            fetch(f"https://localhost:{made.port}/down", trusted=trusted)


def test_over_http() -> None:
    """The route would not use what was fetched, or not say which item could not be."""
    backend = ScriptedBackend()
    app = create_app(
        lambda: backend, WebArgs(allow_urls=True), fetch=RemoteImages(allowed=lambda address: True)
    )
    with host({"/a?token=secret": OK}) as made, running(app) as address:
        url = f"http://127.0.0.1:{made.port}/a?token=secret"
        items = [{"text": "a"}, {"image": url}, {"image": url}]
        asked = {"model": "base", "input": items}
        assert httpx.post(f"{address}/v1/embeddings", json=asked).status_code == 200
        assert [getattr(item, "content", None) for item in backend.asked[0].items] == [
            None,
            b"image",
            b"image",
        ]  # type: ignore[attr-defined]
        items[2]["image"] = "http://127.0.0.1:1/b?token=secret"
        refused = httpx.post(f"{address}/v1/embeddings", json=asked)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "input.2"
        assert "secret" not in refused.text


def test_the_product_fetches_public_addresses_alone() -> None:
    """The check would be right and not in use."""
    backend = ScriptedBackend()
    with host({"/": OK}) as made, running(create_app(lambda: backend, WebArgs(allow_urls=True))) as address:
        asked = {"model": "base", "input": [{"image": f"http://127.0.0.1:{made.port}/"}]}
        refused = httpx.post(f"{address}/v1/embeddings", json=asked)
        assert "not at a public address" in refused.json()["error"]["message"]
        assert made.seen == []


def test_hosts_without_permission() -> None:
    """Somebody would believe that images are fetched from the hosts that they listed."""
    with pytest.raises(ConfigError, match="allow_urls"):
        create_app(ScriptedBackend, WebArgs(url_hosts=("example.org",)))
