"""One model with adapters and an encoded folder, behind a server with the page, for a browser."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import clipgraft as cg
from clipgraft.errors import ClipgraftError
from clipgraft.serve.api import create_app
from clipgraft.serve.args import ServiceArgs, WebArgs
from clipgraft.serve.messages import Message, State
from clipgraft.serve.service import Service
from served_app import running

PICTURES = 40
TARGETS = {"vi": "text-attention", "fr": "text-linear", "both": "attention"}


@dataclass
class Between:
    """A backend that hands messages on to a service, and outlives the server that closes it.

    Attributes:
        failures: what the next messages of a type fail with, one each.
        asked: the messages that were handed on.
    """

    service: Service
    failures: dict[type, list[ClipgraftError]] = field(default_factory=dict)
    asked: list[Message[Any]] = field(default_factory=list)

    @property
    def state(self) -> State:
        return self.service.state

    async def answer(self, message: Message[Any], *, timeout: float | None = None) -> Any:
        if waiting := self.failures.get(type(message)):
            raise waiting.pop(0)
        self.asked.append(message)
        return await self.service.answer(message, timeout=timeout)

    async def close(self) -> None:
        return None


@dataclass(frozen=True)
class Site:
    """A server with the page."""

    url: str
    between: Between
    pictures: Path


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures with captions, and what was encoded of it in `encoded`."""
    root = tmp_path_factory.mktemp("scenes")
    tables = cg.emoji.write_scenes(root, "val", PICTURES, ["en"])
    cg.search.encode_folder(cg.load("emoji"), tables["en"], root / "encoded", workers=0, progress=False)
    return root


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters whose updates change what is found."""
    made = {}
    for seed, (name, targets) in enumerate(TARGETS.items()):
        clip = cg.load("emoji")
        torch.manual_seed(seed)
        cg.apply_lora(clip, r=2, targets=targets)
        for parameter_name, parameter in clip.model.named_parameters():
            if "lora_B" in parameter_name:
                nn.init.normal_(parameter, std=0.2)
        made[name] = cg.save_adapter(clip, tmp_path_factory.mktemp("adapters") / name)
    return made


@pytest.fixture(scope="session")
def service(scenes: Path, adapters: dict[str, Path]) -> Iterator[Service]:
    """The emoji base with its adapters and its folder."""
    words = tuple(f"{name}={path}" for name, path in adapters.items())
    args = ServiceArgs(adapters=words, folders=(f"photos={scenes / 'encoded'}",))
    with Service(cg.load("emoji"), args) as made:
        yield made


@pytest.fixture(scope="session")
def shared_site(service: Service, scenes: Path) -> Iterator[Site]:
    """A server with default options, but a small limit of what may be sent."""
    between = Between(service)
    with running(create_app(lambda: between, WebArgs(max_body_mb=0.25))) as url:
        yield Site(url, between, scenes / "images")


@pytest.fixture
def site(shared_site: Site) -> Site:
    """That server, which was asked nothing yet."""
    shared_site.between.failures.clear()
    shared_site.between.asked.clear()
    return shared_site


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of a browser."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no chromium to open the page in: apt-get install chromium")
    return found
