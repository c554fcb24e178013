"""`/rank` and `/v1/rerank`: documents by their cosine to a query, in the shape of Jina and Cohere."""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import APIRouter, Body
from pydantic import Field
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from clipgraft.serve.api.asking import ask_with, check_count, each_of, weights
from clipgraft.serve.api.bodies import JsonRoute
from clipgraft.serve.api.examples import PIXEL, named
from clipgraft.serve.api.failures import BODY_STATUSES, statuses
from clipgraft.serve.api.images import read_items
from clipgraft.serve.api.schemas import Item, Items, Model, Shape, Strength, Strict, Usage, usage
from clipgraft.serve.messages import Rank

router = APIRouter(route_class=JsonRoute, tags=["classify, rank, search"])


class RankRequest(Strict):
    """A query, and documents to sort."""

    query: Item = Field(description='A text, {"text": …} or {"image": …}.')
    documents: Items = Field(description='Texts, {"text": …} and {"image": …}, mixed.')
    top_n: int | None = Field(None, ge=1, le=1_000_000, description="Most results; all by default.")
    return_documents: bool = Field(False, description="Repeat the texts of the results.")
    model: Model | None = Field(None, description="The base by default.")
    strength: Strength = 1.0


class RankedDocument(Shape):
    """A document's number, and its cosine to the query."""

    index: int
    relevance_score: float
    document: dict[str, str] | None = None


class RankResponse(Shape):
    """Documents, best first."""

    id: str
    model: str | None
    results: list[RankedDocument]
    usage: Usage


_EXAMPLES = named(
    texts={"query": "a cat", "documents": ["a kitten", "a car"], "top_n": 1},
    images={"query": "a red square", "documents": [{"image": PIXEL}, {"text": "a car"}]},
)


async def rank(request: Request, asked: Annotated[RankRequest, Body(openapi_examples=_EXAMPLES)]) -> Response:
    """Sort texts and images by their cosine to a text or an image."""
    check_count(request, len(asked.documents), "documents")
    documents = await read_items(request, asked.documents, each_of("documents"))
    (query,) = await read_items(request, [asked.query], lambda _: "query")
    using = await weights(request, asked.model, asked.strength)
    found = await ask_with(request, Rank(query, documents, using, asked.top_n), using, _field)
    results: list[dict[str, Any]] = [
        {"index": index, "relevance_score": score}
        for index, score in zip(found.order, found.scores, strict=True)
    ]
    if asked.return_documents:
        for result in results:
            result["document"] = _text_of(asked.documents[result["index"]])
    body = {
        "id": f"rerank-{time.time_ns():x}",
        "model": asked.model,
        "results": results,
        "usage": usage(found.tokens),
    }
    return Response(to_json(body), media_type="application/json")


def _field(index: int) -> str:
    """Name an item of the message: the query is the first."""
    return f"documents.{index - 1}" if index else "query"


def _text_of(item: Item) -> dict[str, str] | None:
    """Return a text as it is repeated; images are not."""
    if isinstance(item, str):
        return {"text": item}
    return {"text": item.text} if hasattr(item, "text") else None


for _path in ("/rank", "/v1/rerank"):
    router.post(
        _path,
        response_model=None,
        responses={200: {"model": RankResponse}, **statuses(*BODY_STATUSES)},
    )(rank)
