"""What the lock flags leave trainable, against open_clip's own lock methods."""

from __future__ import annotations

import copy
from typing import Any

import open_clip
import pytest
from torch import nn

import clipgraft as cg
from clipgraft.models.clip import as_clip
from clipgraft.models.sites import Tower
from clipgraft.train.setup import lock_tower

TOWERS: list[Tower] = ["text", "vision"]


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def custom_text(**vision: Any) -> nn.Module:
    """CustomTextCLIP, whose text tower is a module of its own."""
    return open_clip.CustomTextCLIP(
        embed_dim=8,
        vision_cfg={"image_size": 16, "patch_size": 8, "width": 16, "head_width": 8, "layers": 3, **vision},
        text_cfg={"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 3},
    )


@pytest.mark.parametrize("groups", range(6))
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("split", [False, True], ids=["CLIP", "CustomTextCLIP"])
def test_locks_are_open_clips(split: bool, tower: Tower, groups: int, tiny_openclip: nn.Module) -> None:
    """`--lock-image-unlocked-groups N` would train other layers than with open_clip."""
    ours = custom_text() if split else tiny_openclip
    theirs = copy.deepcopy(ours)
    lock_tower(as_clip(ours), tower, groups)
    if tower == "vision":
        theirs.lock_image_tower(unlocked_groups=groups)  # type: ignore[operator]
    else:
        theirs.lock_text_tower(unlocked_layers=groups)  # type: ignore[operator]
    assert trainable(ours) == trainable(theirs)


@pytest.mark.parametrize("groups", range(5))
@pytest.mark.parametrize("tower", TOWERS)
def test_transformers_unlocks_the_same_weights(
    tower: Tower, groups: int, tiny_hf: nn.Module, tiny_openclip: nn.Module
) -> None:
    """The same flags on the same model from the other library would train something else."""
    counts = []
    for model in (tiny_hf, tiny_openclip):
        lock_tower(as_clip(model), tower, groups)
        blocks = [
            {0, 1} & {int(part) for part in name.split(".") if part.isdigit()} for name in trainable(model)
        ]
        outside = [name for name, found in zip(trainable(model), blocks, strict=True) if not found]
        in_blocks = sum(model.get_parameter(name).numel() for name in trainable(model) - set(outside))
        counts.append((in_blocks, sum("ln" in name or "norm" in name for name in outside)))
    assert counts[0] == counts[1]


def test_a_resnet_is_locked_whole_or_not_at_all() -> None:
    """open_clip refuses to unlock a part of a ResNet; unlocking all of it instead would go unnoticed."""
    text = {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}
    model = open_clip.CLIP(8, vision, text)
    lock_tower(as_clip(model), "vision")
    assert not any(name.startswith("visual") for name in trainable(model))
    with pytest.raises(
        cg.errors.ConfigError, match="`lock_image_unlocked_groups`: this base's vision tower can only"
    ):
        lock_tower(as_clip(model), "vision", 1)


def test_the_other_tower_and_the_temperature_stay_trainable(tiny_hf: nn.Module) -> None:
    """`--lock-image` alone must leave a text tower to train."""
    lock_tower(as_clip(tiny_hf), "vision")
    left = trainable(tiny_hf)
    assert "logit_scale" in left
    assert "text_projection.weight" in left
    assert not any(name.startswith("vis") for name in left)
