"""One set of weights in the layout that a test asks for."""

from __future__ import annotations

import pytest
from torch import nn

from tiny_models import in_every_layout


@pytest.fixture
def model(layout: str, tiny_openclip: nn.Module, tiny_openclip_4x: nn.Module) -> nn.Module:
    """The tiny open_clip model in one of the layouts of `in_every_layout`."""
    return in_every_layout(tiny_openclip, tiny_openclip_4x)[layout]
