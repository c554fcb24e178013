"""The stand-in device, a tiny base with tokenizer and transforms, and pairs to train it on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import clipgraft as cg
from clipgraft.models.clip import Clip
from clipgraft.models.load import load
from standin_device import standin_device
from tiny_pictures import write_pictures


@pytest.fixture(autouse=True)
def device() -> Iterator[torch.device]:
    """The stand-in, which torch knows within a test of this folder."""
    with standin_device() as found:
        yield found


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> cg.Pairs:
    """12 images and 24 captions. Read only."""
    return cg.read_pairs(write_pictures(tmp_path_factory.mktemp("pictures")))


@pytest.fixture(scope="session")
def _loaded(tiny_config: Path) -> Clip:
    return load(str(tiny_config), "none")


@pytest.fixture
def make_clip(_loaded: Clip) -> Callable[[], Clip]:
    """The same tiny base on the CPU, a fresh copy a call."""
    return lambda: replace(_loaded, model=copy.deepcopy(_loaded.model))
