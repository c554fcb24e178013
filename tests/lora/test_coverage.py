"""A target set that covers less than its name says, says so before anything trains."""

from __future__ import annotations

import logging

import pytest
from torch import nn

import clipgraft as cg
from clipgraft.lora.coverage import uncovered
from clipgraft.models.clip import as_clip
from tiny_models import build_hf
from tiny_siglip import build_siglip
from tiny_towers import build_tower


@pytest.mark.parametrize(
    ("family", "targets", "told"),
    [
        ("ResNet", "linear", ["vision tower (a ModifiedResNet), ", "of the weights of its layers: it has "]),
        ("ConvNeXt", "attention", ["adapt 8 sites and none in the vision tower", "it has patch_embedding"]),
        ("EVA02", "linear", []),
        ("PE", "linear-vision,text-attention", []),
        ("SigLIP", "attention,mlp", []),
        ("Swin", "all", []),
    ],
)
def test_what_a_set_does_not_reach(family: str, targets: str, told: list[str]) -> None:
    """`linear` silently means the text tower alone, or a complete set is said to be short."""
    lines = uncovered(as_clip(build_tower(family)), targets)
    assert len(lines) == bool(told)
    assert all(part in lines[0] for part in told)


@pytest.mark.parametrize("build", [build_hf, build_siglip])
@pytest.mark.parametrize("targets", ["linear", "attention", "all", "text.*.q,v", "linear-vision"])
def test_plain_models_are_covered(build: object, targets: str) -> None:
    """A usual run starts with a warning about nothing."""
    assert uncovered(as_clip(build()), targets) == []


def test_it_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """What a set leaves out is known to nobody, or dropout that does not act."""
    model: nn.Module = build_tower("ResNet")
    with caplog.at_level(logging.WARNING, "clipgraft"):
        cg.apply_lora(model, targets="linear", dropout=0.1)
    assert "targets 'linear' reach" in caplog.text
    assert "dropout=0.1 does not act at 4 sites, vision.pool_q" in caplog.text


def test_nothing_left() -> None:
    """A set that matches no site trains nothing and says nothing."""
    with pytest.raises(cg.errors.TargetError, match="matches no site"):
        cg.apply_lora(build_tower("ConvNeXt"), targets="vision-attention")
