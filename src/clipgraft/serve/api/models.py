"""`/v1/models` and the loading of adapters, in vLLM's shapes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, Body
from pydantic import Field
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from clipgraft.errors import AdapterError, CheckpointError, UnknownNameError
from clipgraft.serve.api.asking import ask, loads_adapters, served, unknown_model
from clipgraft.serve.api.bodies import JsonRoute
from clipgraft.serve.api.examples import named
from clipgraft.serve.api.failures import BODY_STATUSES, RefusedError, did_you_mean, statuses
from clipgraft.serve.api.schemas import Model, Shape, Strict
from clipgraft.serve.messages import AdapterInfo, Describe, Description, LoadAdapter, UnloadAdapter

router = APIRouter(route_class=JsonRoute, tags=["models"])


class ModelCard(Shape):
    """What `model` of a request may be: the base, or an adapter, whose `parent` is the base."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    state: str = Field(description="Of an adapter: registered, loading, loaded or failed.")


class ModelList(Shape):
    """The base and its adapters."""

    object: Literal["list"]
    data: list[ModelCard]


class LoadRequest(Strict):
    """An adapter to load."""

    lora_name: str = Field(
        max_length=256,
        pattern=r"^\w[\w.+-]*$",
        description="What requests will call it: letters, digits and _.+-, the first a letter or digit.",
    )
    lora_path: str = Field(
        min_length=1, max_length=4096, description="Its folder, in or under the server's `adapter_root`."
    )
    load_inplace: bool = Field(False, description="Replace the adapter that has this name.")


class UnloadRequest(Strict):
    """An adapter to forget."""

    lora_name: Model
    lora_int_id: int | None = Field(None, description="Is ignored.")


def _cards(found: Description) -> dict[str, dict[str, object]]:
    cards = {found.base: _card(found.base, found, found.base, None, "loaded")}
    for adapter in found.adapters:
        cards.setdefault(adapter.name, _card(adapter.name, found, adapter.source, found.base, adapter.state))
    return cards


def _card(name: str, found: Description, root: str, parent: str | None, state: str) -> dict[str, object]:
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "clipgraft",
        "root": root,
        "parent": parent,
        "max_model_len": found.context_length,
        "state": state,
    }


@router.get("/v1/models", response_model=None, responses={200: {"model": ModelList}, **statuses(429)})
async def models(request: Request) -> Response:
    """List the base and its adapters: what `model` of a request may be."""
    cards = _cards(await ask(request, Describe()))
    body = {"object": "list", "data": list(cards.values())}
    return Response(to_json(body), media_type="application/json")


@router.get(
    "/v1/models/{model:path}",
    response_model=None,
    responses={200: {"model": ModelCard}, **statuses(404, 429)},
)
async def model(request: Request, model: str) -> Response:
    """Describe the base or an adapter."""
    found = await ask(request, Describe())
    cards = _cards(found)
    card = cards.get(model) or cards.get(model.removeprefix(f"{found.base}:"))
    if card is None:
        raise unknown_model(model, list(cards))
    return Response(to_json(card), media_type="application/json")


@router.post(
    "/v1/load_lora_adapter",
    response_class=PlainTextResponse,
    responses=statuses(403, *BODY_STATUSES),
)
async def load_lora_adapter(
    request: Request,
    asked: Annotated[
        LoadRequest, Body(openapi_examples=named(load={"lora_name": "shoes", "lora_path": "shoes"}))
    ],
) -> str:
    """Register an adapter and load it; off unless the server was started with `allow_adapter_loading`."""
    _check_allowed(request)
    source = await asyncio.to_thread(_inside_root, request, asked.lora_path)
    known = await ask(request, Describe())
    if asked.lora_name == known.base:
        message = "`lora_name`: is the name of the base; choose another"
        raise RefusedError(400, message, param="lora_name")
    if not asked.load_inplace and asked.lora_name in [adapter.name for adapter in known.adapters]:
        message = "`lora_name`: there is such an adapter; unload it first, or give `load_inplace`"
        raise RefusedError(400, message, param="lora_name")
    try:
        info = await ask(request, LoadAdapter(asked.lora_name, str(source), asked.load_inplace))
    except (AdapterError, CheckpointError) as error:
        # It is the request that brought what cannot be used, other than with an adapter of the server's own.
        raise RefusedError(400, "; ".join(error.lines), param="lora_path", code="adapter_unusable") from None
    return f"Success: LoRA adapter '{info.name}' added successfully."


@router.post(
    "/v1/unload_lora_adapter",
    response_class=PlainTextResponse,
    responses=statuses(403, *BODY_STATUSES),
)
async def unload_lora_adapter(
    request: Request,
    asked: Annotated[UnloadRequest, Body(openapi_examples=named(unload={"lora_name": "shoes"}))],
) -> str:
    """Forget an adapter; requests that are under way end with it."""
    _check_allowed(request)
    try:
        await ask(request, UnloadAdapter(asked.lora_name))
    except UnknownNameError:
        adapters: tuple[AdapterInfo, ...] = (await ask(request, Describe())).adapters
        near = did_you_mean(asked.lora_name, [adapter.name for adapter in adapters])
        message = f"`lora_name`: there is no such adapter{near}; /v1/models lists them"
        raise RefusedError(404, message, param="lora_name", code="model_not_found") from None
    return f"Success: LoRA adapter '{asked.lora_name}' removed successfully."


def _check_allowed(request: Request) -> None:
    web = served(request).web
    if not web.allow_adapter_loading or web.adapter_root is None:
        message = "this server loads and unloads no adapters: start it with `allow_adapter_loading`"
        raise RefusedError(403, f"{message} and `adapter_root`", code="adapter_loading_is_off")
    if not loads_adapters(web):
        message = "each of this server's processes has adapters of its own, and a request reaches one of them"
        raise RefusedError(403, f"{message}: give all at the start", code="adapter_loading_is_off")


def _inside_root(request: Request, given: str) -> Path:
    """Return the folder that a request names, with all links followed; it must lie in the allowed one."""
    root = served(request).web.adapter_root
    assert root is not None
    message = "`lora_path`: there is no such folder in the server's `adapter_root`"
    refusal = RefusedError(400, message, param="lora_path")
    try:
        wanted = (root / given).resolve()
        inside = wanted.is_relative_to(root.resolve()) and wanted.is_dir()
    except (OSError, ValueError, RuntimeError):  # too long a name, a zero byte, links in a circle
        raise refusal from None
    if not inside:
        raise refusal
    return wanted
