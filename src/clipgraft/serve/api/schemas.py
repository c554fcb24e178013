"""The shapes that several dialects share: texts, images, which weights answer, and errors."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

LONGEST_TEXT = 32_768
"""Characters of a text; no CLIP model reads as many, and tokenising more costs others their turn."""

LONGEST_NAME = 512


class Strict(BaseModel):
    """Base of every request: nothing is converted, no field is unknown, no number is NaN or infinite."""

    model_config = ConfigDict(
        strict=True, extra="forbid", allow_inf_nan=False, frozen=True, protected_namespaces=()
    )


class Shape(BaseModel):
    """Base of every answer, for the schema; answers are written without a check."""

    model_config = ConfigDict(protected_namespaces=())


TextContent = Annotated[str, Field(max_length=LONGEST_TEXT, description="A text.")]
ImageContent = Annotated[
    str,
    Field(
        min_length=1,
        description="An image file: `data:image/png;base64,…`, its base64 alone, or an http(s) URL where the "
        "server fetches them.",
    ),
]
Model = Annotated[
    str,
    Field(
        min_length=1,
        max_length=LONGEST_NAME,
        description="The base's name, an adapter's, or `base:adapter` (see /v1/models).",
    ),
]
Strength = Annotated[
    float,
    Field(
        ge=-100,
        le=100,
        description="What the adapter's update is multiplied by: 0 is the base, 1 the adapter as trained.",
    ),
]


class TextObject(Strict):
    """A text, written as an object."""

    text: TextContent


class ImageObject(Strict):
    """An image."""

    image: ImageContent


FORM = "as-"
"""What the names of the forms of a union begin with, which are no part of a place in a request."""


def form_of(value: Any) -> str | None:
    """Say which form of an item a value has, so that a fault is told of that form alone."""
    if isinstance(value, str):
        return "as-string"
    if isinstance(value, list):
        return "as-list"
    if isinstance(value, dict):
        return "as-image" if "image" in value else "as-text"
    if isinstance(value, TextObject):
        return "as-text"
    return "as-image" if isinstance(value, ImageObject) else None


Item: TypeAlias = Annotated[
    Annotated[TextContent, Tag("as-string")]
    | Annotated[TextObject, Tag("as-text")]
    | Annotated[ImageObject, Tag("as-image")],
    Discriminator(
        form_of,
        custom_error_type="item",
        custom_error_message='a text, {"text": …} or {"image": …}',
    ),
]
Items: TypeAlias = Annotated[list[Item], Field(min_length=1)]
OneOrMore: TypeAlias = Annotated[
    Annotated[TextContent, Tag("as-string")]
    | Annotated[TextObject, Tag("as-text")]
    | Annotated[ImageObject, Tag("as-image")]
    | Annotated[Items, Tag("as-list")],
    Discriminator(
        form_of,
        custom_error_type="item",
        custom_error_message='a text, {"text": …}, {"image": …}, or a list of such',
    ),
]


class Usage(Shape):
    """What a request cost, in tokens of texts and patches of images."""

    prompt_tokens: int
    total_tokens: int


def usage(tokens: tuple[int, ...]) -> dict[str, int]:
    """Return the counts of `Usage`."""
    return {"prompt_tokens": sum(tokens), "total_tokens": sum(tokens)}


class ErrorBody(Shape):
    """What was wrong, where, and what to do."""

    message: str
    type: Literal[
        "invalid_request_error",
        "authentication_error",
        "permission_error",
        "not_found_error",
        "rate_limit_error",
        "service_unavailable_error",
        "server_error",
    ]
    param: str | None
    code: str


class ErrorShape(Shape):
    """The shape of every error, which is OpenAI's."""

    error: ErrorBody
