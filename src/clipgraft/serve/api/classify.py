"""`/classify`: probabilities of texts and images over classes, by prompts or by a trained head."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Body
from pydantic import Field
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from clipgraft.serve.api.asking import ask_with, check_count, weights
from clipgraft.serve.api.bodies import JsonRoute
from clipgraft.serve.api.examples import PIXEL, named
from clipgraft.serve.api.failures import BODY_STATUSES, RefusedError, statuses
from clipgraft.serve.api.images import read_items
from clipgraft.serve.api.schemas import Model, OneOrMore, Shape, Strength, Strict
from clipgraft.serve.messages import Classified, Classify, weights_fault

router = APIRouter(route_class=JsonRoute, tags=["classify, rank, search"])
_MOST_PROMPTS = 200_000
TemplateWeight = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
Prompt = Annotated[str, Field(min_length=1, max_length=1000)]


class ClassifyRequest(Strict):
    """Texts or images, and classes."""

    input: OneOrMore = Field(description='A text, {"text": …}, {"image": …}, or a list of such.')
    classes: list[Prompt] = Field(
        default_factory=list,
        max_length=100_000,
        description="Their names; none are those of the head that was trained with the adapter.",
    )
    templates: list[Prompt] = Field(
        ["{}"], min_length=1, max_length=1000, description="Prompts with {} for the class."
    )
    template_weights: list[TemplateWeight] = Field(
        default_factory=list,
        max_length=1000,
        description="How much each template counts in the mean of a class; none are all alike.",
    )
    head: bool | None = Field(
        None, description="Use the adapter's trained head; by default where no classes are given."
    )
    model: Model | None = Field(None, description="The base by default.")
    strength: Strength = 1.0


class ClassifiedItem(Shape):
    """The probabilities of one item, in the order of the classes."""

    index: int
    label: str
    probs: list[float]
    scores: list[float] = Field(description="Cosines, or logits of a head.")
    num_classes: int


class ClassifyResponse(Shape):
    """Probabilities over classes."""

    object: Literal["list"]
    classes: list[str]
    kind: Literal["softmax", "sigmoid"]
    data: list[ClassifiedItem]


_EXAMPLES = named(
    image={"input": {"image": PIXEL}, "classes": ["red", "green"], "templates": ["a {} square"]},
    texts={"input": ["a cat", "a dog"], "classes": ["animal", "vehicle"]},
)


@router.post(
    "/classify",
    response_model=None,
    responses={200: {"model": ClassifyResponse}, **statuses(*BODY_STATUSES)},
)
async def classify(
    request: Request, asked: Annotated[ClassifyRequest, Body(openapi_examples=_EXAMPLES)]
) -> Response:
    """Give texts or images probabilities over classes."""
    _check_prompts(asked)
    given = asked.input if isinstance(asked.input, list) else [asked.input]
    check_count(request, len(given), "input")
    check_count(request, len(asked.classes), "classes")
    items = await read_items(request, given)
    using = await weights(request, asked.model, asked.strength)
    shares = tuple(asked.template_weights)
    message = Classify(items, tuple(asked.classes), tuple(asked.templates), using, asked.head, shares)
    found = await ask_with(request, message, using)
    return Response(_written(found), media_type="application/json")


def _check_prompts(asked: ClassifyRequest) -> None:
    for index, template in enumerate(asked.templates):
        if "{}" not in template:
            told = f"`templates.{index}`: has no {{}} where the name of the class goes"
            raise RefusedError(400, told, param=f"templates.{index}")
    if told := weights_fault(asked.template_weights, asked.templates):
        raise RefusedError(400, told, param="template_weights")
    if len(asked.templates) * len(asked.classes) > _MOST_PROMPTS:
        told = f"`templates`: times `classes` are more than {_MOST_PROMPTS:,} prompts; give fewer"
        raise RefusedError(400, told, param="templates")
    if len(set(asked.classes)) < len(asked.classes):
        raise RefusedError(400, "`classes`: some name is there twice; give each once", param="classes")


def _written(found: Classified) -> bytes:
    rows = [
        {
            "index": index,
            "label": found.classes[int(probabilities.argmax())],
            "probs": probabilities.tolist(),
            "scores": scores.tolist(),
            "num_classes": len(found.classes),
        }
        for index, (probabilities, scores) in enumerate(zip(found.probabilities, found.scores, strict=True))
    ]
    return to_json({"object": "list", "classes": found.classes, "kind": found.kind, "data": rows})
