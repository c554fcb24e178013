"""A small model with two adapters, and a server over it, shared by the tests of the web side."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from torch import nn

import clipgraft as cg
from clipgraft.models.clip import Clip
from clipgraft.serve.api import create_app
from clipgraft.serve.args import ServiceArgs, WebArgs
from clipgraft.serve.service import Service
from lent_backend import LentBackend
from served_app import running


@pytest.fixture(scope="session")
def adapter_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of the emoji base whose updates matter: `vi` of the text tower, `both` of both."""
    made = {}
    for seed, (name, targets) in enumerate({"vi": "text-attention", "both": "attention"}.items()):
        clip = cg.load("emoji")
        torch.manual_seed(seed)
        cg.apply_lora(clip, r=4, targets=targets)
        for parameter_name, parameter in clip.model.named_parameters():
            if "lora_B" in parameter_name:
                nn.init.normal_(parameter, std=0.5)
        made[name] = cg.save_adapter(clip, tmp_path_factory.mktemp("adapters") / name)
    return made


@pytest.fixture(scope="session")
def offline() -> Clip:
    """The emoji base, to compare answers with."""
    return cg.load("emoji")


@pytest.fixture(scope="session")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six scenes, encoded by the base."""
    root = tmp_path_factory.mktemp("scenes")
    tables = cg.emoji.write_scenes(root, "val", 6, ["en"])
    cg.search.encode_folder(cg.load("emoji"), tables["en"], root / "encoded", progress=False)
    return root / "encoded"


@pytest.fixture(scope="session")
def backend(adapter_folders: dict[str, Path], encoded: Path) -> Iterator[LentBackend]:
    """The emoji base with its two adapters, and the scenes as the folder `photos`."""
    words = tuple(f"{name}={path}" for name, path in adapter_folders.items())
    args = ServiceArgs(adapters=words, folders=(f"photos={encoded}",), timeout=120, max_queue_seconds=120)
    with Service(cg.load("emoji"), args) as service:
        yield LentBackend(service)


@pytest.fixture(scope="session")
def address(backend: LentBackend) -> Iterator[str]:
    """A server with default options."""
    with running(create_app(lambda: backend, WebArgs(max_body_mb=1, max_items=64))) as url:
        yield url


@pytest.fixture
def client(address: str) -> Iterator[httpx.Client]:
    """A client of that server."""
    with httpx.Client(base_url=address, timeout=60) as made:
        yield made
