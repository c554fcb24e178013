"""Ask the backend on behalf of a request: which weights a name means, and an end when the client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, TypeVar

from starlette.requests import Request
from starlette.types import Receive

from clipgraft.errors import ItemError, UnavailableError, UnknownNameError
from clipgraft.serve.api.failures import ClientGoneError, RefusedError, did_you_mean
from clipgraft.serve.args import WebArgs
from clipgraft.serve.logs import note_answer
from clipgraft.serve.messages import (
    BASE,
    Backend,
    Describe,
    Description,
    Message,
    With,
)
from clipgraft.serve.metrics import Metrics
from clipgraft.shown import shown_line

Answer = TypeVar("Answer")
Fields: TypeAlias = Callable[[int], str]


def each_of(field: str) -> Fields:
    """Name items by their places in the list of a field."""
    return lambda index: f"{field}.{index}"


INPUT = each_of("input")


def bad_item(error: ItemError, fields: Fields) -> RefusedError:
    """Refuse an item by the name of its field."""
    field = fields(error.index)
    return RefusedError(400, f"`{field}`: {error.reason}", param=field, code="invalid_item")


class Fetcher(Protocol):
    """Fetches an image from a public address; raises ValueError with the reason in a few words."""

    async def __call__(self, url: str) -> bytes:
        """Return the bytes that the address gives."""


@dataclass
class Served:
    """What the routes of an application share.

    Attributes:
        web: the server's options.
        backend: answers messages.
        metrics: what `/metrics` tells.
        fetch: fetches images from addresses; None where that is not allowed.
        base: the first description, of which only what never changes is read: the base's name and width.
    """

    web: WebArgs
    backend: Backend
    metrics: Metrics
    fetch: Fetcher | None = None
    base: Description | None = None


def loads_adapters(web: WebArgs) -> bool:
    """Whether requests may load adapters: in one process alone, since others would not learn of it."""
    return web.allow_adapter_loading and web.adapter_root is not None and web.workers == 1


def served(request: Request) -> Served:
    """Return what the routes of the request's application share."""
    found: Served = request.app.state.served
    return found


async def ask(request: Request, message: Message[Answer]) -> Answer:
    """Answer a message, and withdraw it once the client is gone.

    Raises:
        ClientGoneError: nobody waits any more.
        ClipgraftError: what the backend raises.
    """
    answer = await while_connected(request, served(request).backend.answer(message))
    note_answer(message, answer)
    return answer


async def while_connected(request: Request, work: Coroutine[Any, Any, Answer]) -> Answer:
    """Return what work gives, and cancel it once the client is gone.

    Raises:
        ClientGoneError: nobody waits any more.
        UnavailableError: the work was cancelled from elsewhere.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.cancelled():  # by whoever does it, not by us
            raise UnavailableError("the model gave this request up")
        if working.done():
            return working.result()
        raise ClientGoneError
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def base_of(request: Request) -> Description:
    """Return what is known of the base; its adapters and folders may have changed since."""
    shared = served(request)
    if shared.base is None:
        shared.base = await ask(request, Describe())
    return shared.base


async def weights(request: Request, model: str | None, strength: float) -> With:
    """Return the weights that `model` means: the base's name, an adapter's, or `base:adapter`."""
    if model is None:
        return _base(strength)
    base = (await base_of(request)).base
    if model == base:
        return _base(strength)
    return With(model.removeprefix(f"{base}:"), strength)


def _base(strength: float) -> With:
    if strength != 1:
        raise RefusedError(400, "`strength`: the base has no adapter that it could scale", param="strength")
    return BASE


async def ask_with(request: Request, message: Message[Answer], using: With, fields: Fields = INPUT) -> Answer:
    """Answer a message that names weights and has items.

    An adapter that is not served is a 404 with near misses; an item that cannot be used is a 400 that names
    the field it came in, which `fields` tells from its number.
    """
    try:
        return await ask(request, message)
    except ItemError as error:
        raise bad_item(error, fields) from error
    except UnknownNameError as error:
        if using.adapter is None:
            raise
        known = await ask(request, Describe())
        names = [known.base, *(adapter.name for adapter in known.adapters)]
        if using.adapter in names[1:]:
            raise  # it is something else that is not known
        raise unknown_model(using.adapter, names) from error


def unknown_model(name: str, names: Sequence[str]) -> RefusedError:
    """Refuse a model's name; `names` are those of the base and its adapters."""
    told = (
        f"'{shown_line(name, 100)}' is neither the base '{names[0]}' nor one of its {len(names) - 1} adapters"
    )
    near = did_you_mean(name, list(names))
    return RefusedError(404, f"{told}{near}; /v1/models lists them", param="model", code="model_not_found")


def check_count(request: Request, count: int, field: str) -> None:
    """Refuse a list that is longer than one request may bring."""
    most = served(request).web.max_items
    if count > most:
        message = (
            f"`{field}`: {count:,} are too many for one request, which takes {most:,}; send them in parts"
        )
        raise RefusedError(400, message, param=field)
