"""`/v1/embeddings`: OpenAI's dialect, with images as infinity, vLLM and Jina take them.

- OpenAI: `input` is a text or a list of texts.
- infinity: `modality` is `image`, and `input` one image or a list of images, as addresses or data URIs.
- vLLM: `messages` instead of `input`, with one `text` or one `image_url` in all.
- Jina: `input` is a list of `{"text": …}` and `{"image": …}`, mixed.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias

from fastapi import APIRouter, Body
from pydantic import ConfigDict, Discriminator, Field, Tag, field_validator, model_validator
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from clipgraft.serve.api.asking import ask_with, base_of, check_count, weights
from clipgraft.serve.api.bodies import JsonRoute
from clipgraft.serve.api.examples import PIXEL, named
from clipgraft.serve.api.failures import BODY_STATUSES, RefusedError, statuses
from clipgraft.serve.api.images import read_items
from clipgraft.serve.api.schemas import (
    ImageContent,
    ImageObject,
    Item,
    Model,
    OneOrMore,
    Shape,
    Strength,
    Strict,
    TextContent,
    Usage,
    usage,
)
from clipgraft.serve.messages import Encode, Encoded

router = APIRouter(route_class=JsonRoute, tags=["embeddings"])
_NO_TOKENS = (
    "token ids are those of another tokenizer than this model's; send texts "
    "(in LangChain: OpenAIEmbeddings(check_embedding_ctx_length=False))"
)


class TextPart(Strict):
    """A text of a message."""

    type: Literal["text"]
    text: TextContent


class Address(Strict):
    """Where an image of a message is."""

    url: ImageContent
    detail: Literal["auto", "low", "high"] | None = Field(None, description="Has no effect on features.")


class ImagePart(Strict):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: Address


def _part_form(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return {"text": "as-text", "image_url": "as-image"}.get(kind) if isinstance(kind, str) else None


Part: TypeAlias = Annotated[
    Annotated[TextPart, Tag("as-text")] | Annotated[ImagePart, Tag("as-image")],
    Discriminator(
        _part_form,
        custom_error_type="item",
        custom_error_message='a part whose `type` is "text" or "image_url"',
    ),
]


def _content_form(value: Any) -> str | None:
    return "as-string" if isinstance(value, str) else "as-list" if isinstance(value, list) else None


class ChatMessage(Strict):
    """A message, as of a chat."""

    role: str = Field(min_length=1, max_length=100, description="Has no effect on features.")
    content: Annotated[
        Annotated[TextContent, Tag("as-string")]
        | Annotated[list[Part], Field(min_length=1, max_length=100), Tag("as-list")],
        Discriminator(
            _content_form,
            custom_error_type="item",
            custom_error_message="a text, or a list of `text` and `image_url` parts",
        ),
    ]


class EmbeddingsRequest(Strict):
    """Texts or images to encode."""

    model: Model
    input: OneOrMore | None = Field(
        None, description='A text, {"text": …}, {"image": …}, or a list of such, mixed.'
    )
    messages: list[ChatMessage] | None = Field(
        None, min_length=1, max_length=100, description="Instead of `input`: one text or one image in all."
    )
    modality: Literal["text", "image"] = Field("text", description="What the plain strings of `input` are.")
    encoding_format: Literal["float", "base64"] = Field(
        "float", description="Lists of numbers, or base64 of little-endian fp32."
    )
    dimensions: int | None = Field(
        None, ge=1, le=1_000_000, description="The width of the features; none is cut to fewer."
    )
    strength: Strength = 1.0
    truncate: bool = Field(
        True, description="Read texts that are too long up to the model's context; false refuses them."
    )
    user: str | None = Field(None, max_length=1000, description="Is ignored.")

    @model_validator(mode="before")
    @classmethod
    def _strings_are_images(cls, values: Any) -> Any:
        """Read the plain strings of `modality: image` as images, which are longer than texts may be."""
        if not isinstance(values, dict) or values.get("modality") != "image":
            return values
        given = values.get("input")
        if isinstance(given, list):
            found: Any = [{"image": item} if isinstance(item, str) else item for item in given]
        else:
            found = {"image": given} if isinstance(given, str) else given
        return {**values, "input": found}

    @field_validator("input", mode="before")
    @classmethod
    def _no_token_ids(cls, value: Any) -> Any:
        first = value[0] if isinstance(value, list) and value else value
        numbers = first if isinstance(first, list) else [first]
        if numbers and isinstance(numbers[0], int) and not isinstance(numbers[0], bool):
            raise ValueError(_NO_TOKENS)
        return value


class Embedding(Shape):
    """The features of one item."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingsResponse(Shape):
    """Features of unit norm, in the order of the items."""

    model_config = ConfigDict(extra="forbid")

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Embedding]
    usage: Usage
    truncated: list[int] = Field(
        description="The numbers of the texts that were longer than the context, whose end was not read."
    )


_EXAMPLES = named(
    texts={"model": "emoji", "input": ["a cat on a sofa", "một con mèo"]},
    base64={"model": "emoji", "input": "a cat", "encoding_format": "base64"},
    images_as_infinity={"model": "emoji", "input": [PIXEL], "modality": "image"},
    mixed_as_jina={"model": "emoji", "input": [{"text": "a cat"}, {"image": PIXEL}]},
    message_as_vllm={
        "model": "emoji",
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": PIXEL}}]}],
    },
)


@router.post(
    "/v1/embeddings",
    response_model=None,
    responses={200: {"model": EmbeddingsResponse}, **statuses(*BODY_STATUSES)},
)
async def embeddings(
    request: Request, asked: Annotated[EmbeddingsRequest, Body(openapi_examples=_EXAMPLES)]
) -> Response:
    """Encode texts and images as features of unit norm."""
    given = _items(asked)
    check_count(request, len(given), "input")
    items = await read_items(request, given)
    if asked.dimensions is not None:
        await _check_width(request, asked.dimensions)
    using = await weights(request, asked.model, asked.strength)
    encoded = await ask_with(request, Encode(items, using), using)
    if encoded.cut and not asked.truncate:
        raise await _too_long(request, encoded)
    return Response(_written(asked, encoded), media_type="application/json")


def _items(asked: EmbeddingsRequest) -> Sequence[Item]:
    if asked.messages is not None:
        if asked.input is not None:
            raise RefusedError(400, "`messages`: give `input` or `messages`, not both", param="messages")
        return [_only_part(asked.messages)]
    if asked.input is None:
        raise RefusedError(400, "`input` is missing: a text, an image, or a list of such", param="input")
    return asked.input if isinstance(asked.input, list) else [asked.input]


def _only_part(messages: Sequence[ChatMessage]) -> Item:
    parts: list[Item] = []
    for message in messages:
        if isinstance(message.content, str):
            parts.append(message.content)
            continue
        for part in message.content:
            if isinstance(part, TextPart):
                parts.append(part.text)
            else:
                parts.append(ImageObject(image=part.image_url.url))
    if len(parts) != 1:
        told = (
            f"`messages`: these have {len(parts)} texts and images; the model encodes one text or one image"
        )
        raise RefusedError(400, f"{told}: send a list in `input` instead", param="messages")
    return parts[0]


async def _check_width(request: Request, dimensions: int) -> None:
    width = (await base_of(request)).dim
    if dimensions != width:
        told = f"`dimensions`: got {dimensions}, allowed is {width}"
        why = "these features were not trained so that their first numbers stand alone"
        raise RefusedError(400, f"{told}: {why}", param="dimensions")


async def _too_long(request: Request, encoded: Encoded) -> RefusedError:
    context = (await base_of(request)).context_length
    index = encoded.cut[0]
    told = f"`input.{index}`: {encoded.tokens[index]} tokens, and the model reads {context}"
    return RefusedError(400, f"{told}; shorten it, or leave `truncate` true", param=f"input.{index}")


def _written(asked: EmbeddingsRequest, encoded: Encoded) -> bytes:
    rows: list[Any]
    if asked.encoding_format == "base64":
        rows = [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in encoded.vectors]
    else:
        rows = encoded.vectors.tolist()
    now = time.time()
    body = {
        "id": f"embd-{time.time_ns():x}",
        "object": "list",
        "created": int(now),
        "model": asked.model,
        "data": [{"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(rows)],
        "usage": usage(encoded.tokens),
        "truncated": encoded.cut,
    }
    return to_json(body)
