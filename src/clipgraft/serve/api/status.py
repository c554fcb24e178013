"""What a server says of itself: whether it lives, whether it is ready, what it serves, how busy it is."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastapi import APIRouter
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from clipgraft.serve.api.asking import ask, loads_adapters, served
from clipgraft.serve.api.failures import RefusedError, retry_headers, statuses
from clipgraft.serve.api.schemas import Shape
from clipgraft.serve.messages import Describe, State, Stats
from clipgraft.serve.metrics import CONTENT_TYPE

router = APIRouter(tags=["server"])


class Health(Shape):
    """The state of the model behind the server."""

    state: State


class AdapterShape(Shape):
    """A registered adapter."""

    name: str
    source: str
    state: str
    error: str
    nbytes: int
    rank: int | None
    targets: str
    towers: list[str]
    classes: list[str]
    requests: int


class FolderShape(Shape):
    """An encoded folder that can be searched."""

    name: str
    path: str
    rows: int
    kind: str


class Limits(Shape):
    """What a request may bring."""

    max_items: int
    max_body_mb: float
    addresses: bool
    adapter_loading: bool


class DescriptionShape(Shape):
    """What is served."""

    base: str
    fingerprint: str
    dim: int
    context_length: int
    device: str
    dtype: str
    adapters: list[AdapterShape]
    folders: list[FolderShape]
    towers: list[str]
    state: State
    limits: Limits


class StatisticsShape(Shape):
    """Counters and measurements since the start of the model."""

    counts: dict[str, int]
    gauges: dict[str, float]
    seconds: dict[str, dict[str, float]]
    batch_sizes: dict[str, float]


_LIVENESS: dict[int | str, dict[str, Any]] = {
    code: shape for code, shape in statuses().items() if code in (421, 503)
}


@router.get("/health", response_model=Health, responses=_LIVENESS)
async def health(request: Request) -> Response:
    """Say whether the server lives: 503 once its model could not be started again."""
    state = served(request).backend.state
    if state == "failed":
        raise RefusedError(
            503, "the model failed for good; see the server's log", code="failed", headers=retry_headers(60)
        )
    return _state(state)


@router.get("/ready", response_model=Health, responses=_LIVENESS)
async def ready(request: Request) -> Response:
    """Say whether a request would be answered now."""
    state = served(request).backend.state
    if state != "ready":
        raise RefusedError(503, f"the model is not ready: {state}", code=state, headers=retry_headers(1))
    return _state(state)


def _state(state: State) -> Response:
    return Response(to_json({"state": state}), media_type="application/json")


@router.get("/describe", response_model=DescriptionShape, responses=statuses(429))
async def describe(request: Request) -> Response:
    """Describe the base, its adapters, the folders that can be searched, and the limits of requests."""
    shared = served(request)
    found = await ask(request, Describe())
    limits = {
        "max_items": shared.web.max_items,
        "max_body_mb": shared.web.max_body_mb,
        "addresses": shared.fetch is not None,
        "adapter_loading": loads_adapters(shared.web),
    }
    body = dataclasses.asdict(found) | {"state": shared.backend.state, "limits": limits}
    return Response(to_json(body), media_type="application/json")


@router.get("/statistics", response_model=StatisticsShape, responses=statuses(429))
async def statistics(request: Request) -> Response:
    """Count what the model did since its start; `/metrics` has the same for Prometheus."""
    found = await ask(request, Stats())
    return Response(to_json(dataclasses.asdict(found), inf_nan_mode="strings"), media_type="application/json")


@router.get(
    "/metrics",
    response_class=PlainTextResponse,
    responses={code: shape for code, shape in statuses().items() if code in (401, 421)},
)
async def metrics(request: Request) -> Response:
    """Count what the server and its model did, for Prometheus."""
    shared = served(request)
    return Response(await shared.metrics.tell(shared.backend), headers={"Content-Type": CONTENT_TYPE})
