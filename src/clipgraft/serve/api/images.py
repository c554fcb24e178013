"""Turn what a request brings into items: texts, and images from data URIs, base64 or addresses."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Sequence
from typing import TypeGuard

import anyio
from starlette.requests import Request

from clipgraft.errors import ItemError
from clipgraft.serve.api import schemas
from clipgraft.serve.api.asking import INPUT, Fetcher, Fields, bad_item, served, while_connected
from clipgraft.serve.messages import Item, Picture, Text

_IN_THREAD = 1 << 20  # characters from which decoding would hold up other requests
_AT_ONCE = 8  # addresses of one request
_SECONDS = 30  # for all addresses of one request


async def read_items(
    request: Request, items: Sequence[schemas.Item], fields: Fields = INPUT
) -> tuple[Item, ...]:
    """Return the items in their order; `fields` names the field that an item came in.

    Raises:
        RefusedError: an image cannot be had; it names the first.
        ClientGoneError: the client left while images were fetched.
    """
    fetching = [item.image for item in items if _is_fetched(item)]
    try:
        if not fetching:
            return tuple([await _read(item, index) for index, item in enumerate(items)])
        fetch = served(request).fetch
        if fetch is None:
            index = next(index for index, item in enumerate(items) if _is_fetched(item))
            raise ItemError(index, "this server fetches no addresses; send the image as a data URI")
        return await while_connected(request, _read_all(items, fetch))
    except ItemError as error:
        raise bad_item(error, fields) from None


def _is_fetched(item: schemas.Item) -> TypeGuard[schemas.ImageObject]:
    return isinstance(item, schemas.ImageObject) and is_address(item.image)


async def _read(item: schemas.Item, index: int) -> Item:
    if isinstance(item, schemas.ImageObject):
        return await decoded(item.image, index)
    return Text(item if isinstance(item, str) else item.text)


async def _read_all(items: Sequence[schemas.Item], fetch: Fetcher) -> tuple[Item, ...]:
    """Read items of which some are fetched, several at once; the first that fails ends it."""
    places = asyncio.Semaphore(_AT_ONCE)

    async def one(index: int, item: schemas.Item) -> Item:
        if not _is_fetched(item):
            return await _read(item, index)
        async with places:
            try:
                return Picture(await fetch(item.image))
            except ValueError as error:
                raise ItemError(index, str(error)) from None

    tasks = [asyncio.ensure_future(one(index, item)) for index, item in enumerate(items)]
    try:
        with anyio.fail_after(_SECONDS):
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        return tuple([await task for task in tasks])
    except TimeoutError:
        index = next(index for index, task in enumerate(tasks) if not task.done())
        raise ItemError(index, f"the images did not all arrive within {_SECONDS} s; send fewer") from None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def is_address(source: str) -> bool:
    """Whether an image is named by its address."""
    return source[:8].lower().startswith(("http://", "https://"))


async def decoded(source: str, index: int) -> Picture:
    """Decode a data URI or base64."""
    content = _payload(source, index)
    try:
        if len(content) > _IN_THREAD:
            return Picture(await asyncio.to_thread(_decode, content))
        return Picture(_decode(content))
    except (binascii.Error, ValueError):
        reason = "the image is neither a data URI, nor base64, nor an http(s) address"
        raise ItemError(index, reason) from None


def _decode(content: str) -> bytes:
    return base64.b64decode(content + "=" * (-len(content) % 4), validate=True)


def _payload(source: str, index: int) -> str:
    if source[:5].lower() != "data:":
        return source
    head, comma, content = source.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ItemError(index, "the data URI is not base64; write data:image/png;base64,…")
    return content
