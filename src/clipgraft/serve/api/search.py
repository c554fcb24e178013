"""`/search` over encoded folders, and the thumbnails of what it finds."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import quote

import numpy as np
from fastapi import APIRouter, Body, Path, Query
from pydantic import Field
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from clipgraft.errors import DataError
from clipgraft.serve.api.asking import ask, ask_with, weights
from clipgraft.serve.api.bodies import JsonRoute
from clipgraft.serve.api.examples import PIXEL, named
from clipgraft.serve.api.failures import BODY_STATUSES, RefusedError, statuses
from clipgraft.serve.api.images import read_items
from clipgraft.serve.api.schemas import (
    LONGEST_NAME,
    ImageContent,
    ImageObject,
    Model,
    Shape,
    Strength,
    Strict,
    TextContent,
)
from clipgraft.serve.messages import Found, Picture, Search, Thumbnail
from clipgraft.shown import one_line

router = APIRouter(route_class=JsonRoute, tags=["classify, rank, search"])


class SearchRequest(Strict):
    """What to look for, and where."""

    text: TextContent | None = None
    image: ImageContent | None = None
    image_weight: float = Field(0.5, ge=0, le=1, description="Of the image where both are given.")
    k: int = Field(10, ge=1, le=1000, description="Most results.")
    where: str | None = Field(
        None, max_length=4096, description="Conditions on metadata, such as `caption~cat and width>=640`."
    )
    folder: str = Field(
        "", max_length=LONGEST_NAME, description="Its name; may be left out where one is served."
    )
    model: Model | None = Field(None, description="The base by default.")
    strength: Strength = 1.0


class Hit(Shape):
    """A row that was found; `thumbnail` is the address of its image."""

    rank: int
    score: float
    row: int
    path: str | None = None
    caption: str | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)
    thumbnail: str


class SearchResponse(Shape):
    """Rows, best first."""

    folder: str
    hits: list[Hit]


_EXAMPLES = named(
    text={"text": "a cat on a sofa", "k": 3},
    image={"image": PIXEL},
    both={"text": "at night", "image": PIXEL, "image_weight": 0.3},
)


@router.post(
    "/search",
    response_model=None,
    responses={200: {"model": SearchResponse}, **statuses(*BODY_STATUSES)},
)
async def search(
    request: Request, asked: Annotated[SearchRequest, Body(openapi_examples=_EXAMPLES)]
) -> Response:
    """Find rows of an encoded folder by a text, an image, or both."""
    if asked.text is None and asked.image is None:
        raise RefusedError(400, "give a `text`, an `image`, or both", param="text")
    picture: Picture | None = None
    if asked.image is not None:
        (item,) = await read_items(request, [ImageObject(image=asked.image)], lambda _: "image")
        assert isinstance(item, Picture)
        picture = item
    using = await weights(request, asked.model, asked.strength)
    message = Search(asked.folder, asked.text, picture, asked.image_weight, asked.k, asked.where, using)
    found = await ask_with(
        request, message, using, lambda index: "text" if index == 0 and asked.text is not None else "image"
    )
    return Response(_written(found), media_type="application/json")


def _written(found: Found) -> bytes:
    folder = quote(found.folder, safe="")
    hits = [{**hit, "thumbnail": f"/thumbnails/{folder}/{hit['row']}"} for hit in found.hits]
    return to_json(
        {"folder": found.folder, "hits": hits}, inf_nan_mode="null", bytes_mode="base64", fallback=_plain
    )


def _plain(value: Any) -> Any:
    """Return what metadata may hold and JSON cannot, as what it can."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else one_line(str(value))


@router.get(
    "/thumbnails/{folder}/{row}",
    response_class=Response,
    responses={
        200: {"content": {"image/jpeg": {"schema": {"type": "string", "format": "binary"}}}},
        **statuses(404, 429),
    },
)
async def thumbnail(
    request: Request,
    folder: Annotated[str, Path(max_length=LONGEST_NAME)],
    row: Annotated[int, Path(ge=0, le=10**12)],
    side: Annotated[int, Query(ge=16, le=1024, description="Most pixels of a side.")] = 320,
) -> Response:
    """Show the image of a row of an encoded folder as a JPEG."""
    try:
        content = await ask(request, Thumbnail(folder, row, side))
    except DataError as error:
        raise RefusedError(404, "; ".join(error.lines), param="row", code="not_found") from None
    headers = {"Cache-Control": "private, max-age=300", "X-Content-Type-Options": "nosniff"}
    return Response(content, media_type="image/jpeg", headers=headers)
