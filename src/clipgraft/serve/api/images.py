"""Turn what a request brings into items: texts, and images from data URIs, base64 or addresses."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Sequence

from starlette.requests import Request

from clipgraft.errors import ItemError
from clipgraft.serve.api import schemas
from clipgraft.serve.api.asking import check_count, served
from clipgraft.serve.messages import Item, Picture, Text

_IN_THREAD = 1 << 20  # characters from which decoding would hold up other requests
_AT_ONCE = 8  # addresses of one request


async def read_items(request: Request, items: Sequence[schemas.Item], field: str) -> tuple[Item, ...]:
    """Return the items in their order.

    Raises:
        RefusedError: there are too many.
        ItemError: an image cannot be had; it names the first.
    """
    check_count(request, len(items), field)
    places = asyncio.Semaphore(_AT_ONCE)
    waiting: dict[int, asyncio.Task[Picture]] = {}
    read: list[Item | None] = [None] * len(items)
    try:
        for index, item in enumerate(items):
            if isinstance(item, schemas.ImageObject):
                if is_address(item.image):
                    waiting[index] = asyncio.create_task(_fetched(request, item.image, index, places))
                else:
                    read[index] = await decoded(item.image, index)
            else:
                read[index] = Text(item if isinstance(item, str) else item.text)
        for index, task in waiting.items():
            read[index] = await task
    finally:
        for task in waiting.values():
            task.cancel()
        await asyncio.gather(*waiting.values(), return_exceptions=True)
    return tuple(item for item in read if item is not None)


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


async def _fetched(request: Request, url: str, index: int, places: asyncio.Semaphore) -> Picture:
    fetch = served(request).fetch
    if fetch is None:
        raise ItemError(index, "this server fetches no addresses; send the image as a data URI")
    async with places:
        try:
            return Picture(await fetch(url))
        except ValueError as error:
            raise ItemError(index, str(error)) from None
