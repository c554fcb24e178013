"""The socket that a server listens on, opened before anything heavy is loaded."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from pathlib import Path

from clipgraft.errors import ConfigError
from clipgraft.serve.args import WebArgs

_BACKLOG = 2048
_ANYONE = 0o666  # who may connect is decided by the folder that the socket lies in


def listen(web: WebArgs) -> socket.socket:
    """Open the socket that the options name.

    Raises:
        ConfigError: the port or the socket is in use, or the address cannot be listened on.
    """
    return _unix(web.uds) if web.uds is not None else _internet(web.host, web.port)


def address_of(listening: socket.socket, web: WebArgs) -> str:
    """Write the address that clients call: `http://…`, or `unix:PATH`."""
    if web.uds is not None:
        return f"unix:{web.uds}"
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(web.host, web.host)
    if ":" in host and not host.startswith("["):
        host = f"[{host}]"
    return f"http://{host}:{listening.getsockname()[1]}"


def leave(web: WebArgs) -> None:
    """Remove what listening leaves behind: a Unix socket's file."""
    if web.uds is not None:
        with contextlib.suppress(OSError):
            web.uds.unlink()


def _internet(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        told = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"`host={host!r}`: cannot be found ({told}); name an address of this machine"
        ) from None
    opened = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # elsewhere it would share the port with whoever has it
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(where)
        opened.listen(_BACKLOG)
    except OSError as error:
        opened.close()
        raise _refused(host, port, error) from None
    return opened


def _refused(host: str, port: int, error: OSError) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        return ConfigError(f"`port={port}` of {host} is in use: end what listens there, or give another port")
    if error.errno == errno.EACCES:
        return ConfigError(
            f"`port={port}`: only the system's administrator may listen there; give one from 1024"
        )
    return ConfigError(f"`host={host!r}`: cannot be listened on ({error.strerror})")


def _unix(path: Path) -> socket.socket:
    if not hasattr(socket, "AF_UNIX"):
        raise ConfigError(f"`uds` {path}: this system has no Unix sockets; use a port")
    _make_way(path)
    opened = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        opened.bind(str(path))
        path.chmod(_ANYONE)
        opened.listen(_BACKLOG)
    except OSError as error:
        opened.close()
        reason = error.strerror or str(error)
        raise ConfigError(f"`uds` {path}: cannot be listened on ({reason}); choose another path") from None
    return opened


def _make_way(path: Path) -> None:
    """Remove a socket that nobody listens on any more; all else that is there stays."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"`uds` {path}: cannot be used ({error.strerror}); choose another path") from None
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"`uds` {path}: there is something else; choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        try:
            asking.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except OSError as error:
            raise ConfigError(
                f"`uds` {path}: cannot be used ({error.strerror}); choose another path"
            ) from None
    raise ConfigError(f"`uds` {path} is in use: end what listens there, or give another path")
