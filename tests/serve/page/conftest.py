"""One model with adapters and an encoded folder, behind a server with the page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import clipgraft as cg
from clipgraft.serve.api import create_app
from clipgraft.serve.args import ServiceArgs, WebArgs
from clipgraft.serve.service import Service
from page_visits import Between, Site, write_adapter
from served_app import running

PICTURES = 40
TARGETS = {"vi": "text-attention", "fr": "text-linear", "both": "attention"}


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures with captions, and what was encoded of it in `encoded`."""
    root = tmp_path_factory.mktemp("scenes")
    tables = cg.emoji.write_scenes(root, "val", PICTURES, ["en"])
    cg.search.encode_folder(cg.load("emoji"), tables["en"], root / "encoded", workers=0, progress=False)
    return root


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters of the text tower, and one of both towers."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: write_adapter(root / name, targets, seed)
        for seed, (name, targets) in enumerate(TARGETS.items())
    }


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
