"""A tiny CLIP that can read words and pictures, and pairs to train it on."""

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
from tiny_pictures import write_pictures


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads cost tiny models far more than they bring, most of all beside other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV of 12 images and 24 captions. Read only."""
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def pairs(pictures: Path) -> cg.Pairs:
    """The pairs of `pictures`."""
    return cg.read_pairs(pictures)


@pytest.fixture(scope="session")
def _loaded_clip(tiny_config: Path) -> Clip:
    return load(str(tiny_config), "none")


@pytest.fixture
def make_clip(_loaded_clip: Clip) -> Callable[[], Clip]:
    """The same tiny open_clip base with tokenizer and transforms, a fresh copy a call."""
    return lambda: replace(_loaded_clip, model=copy.deepcopy(_loaded_clip.model))


@pytest.fixture
def clip(make_clip: Callable[[], Clip]) -> Clip:
    """One copy of the tiny base."""
    return make_clip()


@pytest.fixture
def hf_clip(hf_folder: Path) -> Clip:
    """The tiny transformers base with tokenizer and processor."""
    return load(str(hf_folder))
