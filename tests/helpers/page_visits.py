"""What tests of the served page share: a backend between server and service, adapters, a browser."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import clipgraft as cg
from clipgraft.errors import ClipgraftError
from clipgraft.serve.messages import Message, State
from clipgraft.serve.service import Service


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
    """A server with the page, and the folder of the pictures that it finds."""

    url: str
    between: Between
    pictures: Path


def write_adapter(place: Path, targets: str, seed: int) -> Path:
    """Write an adapter of the emoji base whose update changes what is found."""
    clip = cg.load("emoji")
    torch.manual_seed(seed)
    cg.apply_lora(clip, r=2, targets=targets)
    for name, parameter in clip.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return cg.save_adapter(clip, place)


def chromium() -> str:
    """The path of a browser; skips the test where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no chromium to open the page in: apt-get install chromium")
    return found
