"""A folder of pictures of which some are damaged, a tiny base, and adapters on either tower of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import clipgraft as cg
from clipgraft.models.clip import Clip
from clipgraft.models.load import load
from encoded_folders import MakeAdapter, write_tree


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads cost tiny models far more than they bring, most of all beside other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """23 images in three folders, one of them damaged and one empty, beside files that are none."""
    return write_tree(tmp_path / "ảnh")


@pytest.fixture
def clip(tiny_config: Path) -> Clip:
    """A tiny base with fixed random weights."""
    return load(str(tiny_config), "none")


@pytest.fixture
def make_adapter(tiny_config: Path, tmp_path: Path) -> MakeAdapter:
    """Save an adapter of a name on some sites of the tiny base, with updates that matter."""

    def make(name: str, targets: str) -> Path:
        clip = load(str(tiny_config), "none")
        torch.manual_seed(len(name))
        cg.apply_lora(clip, r=2, targets=targets)
        for parameter_name, parameter in clip.model.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter)
        return cg.save_adapter(clip, tmp_path / "adapters" / name)

    return make
