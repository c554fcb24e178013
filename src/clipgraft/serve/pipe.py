"""Numbered, pickled frames between a web process and its model's process, over a pair of sockets."""

from __future__ import annotations

import asyncio
import pickle
import socket
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from clipgraft.errors import ClipgraftError, UnavailableError

_HEAD = struct.Struct("!BQQ")  # kind, number, bytes that follow


class Kind(IntEnum):
    """What a frame says. The first three go to the model's process, the others come from it."""

    ASK = 0
    CANCEL = 1
    CLOSE = 2
    BEAT = 3
    ANSWER = 4
    ERROR = 5
    UNUSABLE = 6


@dataclass(frozen=True)
class Frame:
    """One frame: which message it is about, 0 for none, and a value."""

    kind: Kind
    number: int
    value: Any


def packed(kind: Kind, number: int = 0, value: Any = None) -> bytes:
    """Write a frame as bytes."""
    body = pickle.dumps(value, protocol=5)
    return _HEAD.pack(kind, number, len(body)) + body


def packed_error(kind: Kind, number: int, error: BaseException) -> bytes:
    """Write an exception as a frame: those of clipgraft as they are, others as a RuntimeError."""
    if isinstance(error, MemoryError):
        error = UnavailableError("there was no memory for this request", 5.0)
    if not isinstance(error, ClipgraftError):
        error = RuntimeError(f"{type(error).__name__}: {error}")
    try:
        return packed(kind, number, error)
    except Exception:  # a subclass of somebody's that holds what cannot be sent
        return packed(kind, number, ClipgraftError(str(error)))


class Pipe:
    """One end of a pair of sockets, in an asyncio program."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._draining = asyncio.Lock()  # Python 3.10 lets one task wait at a time

    @classmethod
    async def over(cls, end: socket.socket) -> Pipe:
        """Take over one end of `socket.socketpair()`."""
        if hasattr(asyncio, "open_unix_connection"):
            return cls(*await asyncio.open_unix_connection(sock=end))
        return cls(*await asyncio.open_connection(sock=end))

    async def send(self, frame: bytes) -> None:
        """Send what `packed` wrote; wait while the other side does not read.

        Raises:
            OSError: the other side is gone.
        """
        if self._writer.is_closing():  # uvloop would raise a RuntimeError
            raise ConnectionResetError
        self._writer.write(frame)
        async with self._draining:
            await self._writer.drain()

    def send_soon(self, frame: bytes) -> None:
        """Send a small frame without waiting, even if the other side is gone."""
        if not self._writer.is_closing():
            self._writer.write(frame)

    async def frames(self) -> AsyncIterator[Frame]:
        """Receive frames until the other side is gone."""
        try:
            while True:
                kind, number, size = _HEAD.unpack(await self._reader.readexactly(_HEAD.size))
                body = await self._reader.readexactly(size)
                yield Frame(Kind(kind), number, pickle.loads(body))
        except (asyncio.IncompleteReadError, OSError):
            return

    def close(self) -> None:
        """Close this end at once."""
        self._writer.transport.abort()
