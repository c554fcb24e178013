"""A backend that several applications use, one after another or at once, and none of them closes."""

from __future__ import annotations

from typing import Any

from clipgraft.serve.messages import Backend, Message, State


class LentBackend:
    """Hands messages on, and outlives the application that closes it."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    @property
    def state(self) -> State:
        return self.backend.state

    async def answer(self, message: Message[Any], *, timeout: float | None = None) -> Any:
        return await self.backend.answer(message, timeout=timeout)

    async def close(self) -> None:
        return None
