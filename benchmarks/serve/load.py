"""Send prepared HTTP requests from many clients at once, and time each answer.

A client is one kept connection that sends its next request when the last was answered. It is written on bare
asyncio streams because the clients share the cores with the server: a full HTTP library would take a
large part of what is measured.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Measured:
    """What clients saw.

    Attributes:
        seconds: of each answered request.
        elapsed: of the whole.
        failures: answers by status, of other than 200.
    """

    seconds: tuple[float, ...]
    elapsed: float
    failures: dict[int, int]

    @property
    def rate(self) -> float:
        """Answered requests a second."""
        return len(self.seconds) / self.elapsed

    def percentile(self, share: float) -> float:
        """The latency that a share of the requests stayed under, in milliseconds; NaN for none."""
        ordered = sorted(self.seconds) or [math.nan]
        return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def request(path: str, body: bytes, host: str = "127.0.0.1") -> bytes:
    """The bytes of a POST of JSON."""
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def run_clients(port: int, requests: Sequence[bytes], clients: int, seconds: float) -> Measured:
    """Let clients send the requests in turns for some seconds, each beginning at another one."""
    return asyncio.run(_run(port, requests, clients, seconds))


async def _run(port: int, requests: Sequence[bytes], clients: int, seconds: float) -> Measured:
    taken: list[float] = []
    failures: dict[int, int] = {}
    started = time.perf_counter()
    until = started + seconds

    async def client(first: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        number = first
        while time.perf_counter() < until:
            sent = time.perf_counter()
            writer.write(requests[number % len(requests)])
            await writer.drain()
            status = await read_answer(reader)
            if status == 200:
                taken.append(time.perf_counter() - sent)
            else:
                failures[status] = failures.get(status, 0) + 1
                await asyncio.sleep(0.05)
            number += clients
        writer.close()

    await asyncio.gather(*(client(number) for number in range(clients)))
    return Measured(tuple(taken), time.perf_counter() - started, failures)


async def read_answer(reader: asyncio.StreamReader) -> int:
    """Read one answer to its end; returns its status."""
    head = await reader.readuntil(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1])
    lines = head.lower().split(b"\r\n")
    length = next((line for line in lines if line.startswith(b"content-length:")), None)
    if length is not None:
        await reader.readexactly(int(length.split(b":")[1]))
        return status
    while size := int((await reader.readline()).strip() or b"0", 16):
        await reader.readexactly(size + 2)
    await reader.readline()
    return status
