"""Models of both families with the same weights."""

from __future__ import annotations

import pytest
from torch import nn

from peft_models import to_openclip


@pytest.fixture
def openclip_twin(tiny_hf: nn.Module) -> nn.Module:
    """An open_clip model with the weights of `tiny_hf`."""
    return to_openclip(tiny_hf)


@pytest.fixture(params=["open_clip", "transformers"])
def trained_on(request: pytest.FixtureRequest) -> nn.Module:
    """The weights of `tiny_hf` in each family; in transformers it is that very model."""
    return request.getfixturevalue({"open_clip": "openclip_twin", "transformers": "tiny_hf"}[request.param])
