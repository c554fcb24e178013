"""Adapters in every kind of tower on the stand-in device: features, gradients and merging are the CPU's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import clipgraft as cg
from clipgraft.models.clip import Clip, as_clip
from explicit_lora import bound, largest, randomise_active
from tiny_dual import BUILDERS, LONE, build, ids_of
from tiny_towers import WEIGHTS, build_tower
from weight_places import pixels


def outputs(clip: Clip, ids: Tensor | None) -> list[Tensor]:
    """What each tower gives for inputs that come from the CPU."""
    found = []
    if "vision" in clip.towers:
        height = clip.family.image_size(clip.model)[0]
        found.append(clip.encode_image(pixels(height)))
    if ids is not None and "text" in clip.towers:
        found.append(clip.encode_text(ids))
    return found


def gradients(clip: Clip, ids: Tensor | None) -> list[Tensor]:
    found = outputs(clip, ids)
    sum(features.cpu().cos().sum() for features in found).backward()
    return [p.grad.cpu() for p in clip.model.parameters() if p.grad is not None]


def compare(model: nn.Module, ids: Tensor | None, device: torch.device) -> None:
    """An adapter on all sites, on the CPU and on the device."""
    cg.apply_lora(model, targets="all", r=2)
    randomise_active(model)
    on_cpu, on_device = as_clip(model), as_clip(copy.deepcopy(model)).to(device)
    wanted, found = gradients(on_cpu, ids), gradients(on_device, ids)
    assert len(found) == len(wanted) > 4
    assert largest(tuple(found), tuple(wanted)) <= bound(tuple(wanted), 1e-4)
    with torch.no_grad():
        features = tuple(outputs(on_cpu, ids))
        cg.merge_lora(on_device)
        merged = tuple(output.cpu() for output in outputs(on_device, ids))
    assert largest(merged, features) <= bound(features, 1e-4)


@pytest.mark.parametrize("family", WEIGHTS)
def test_vision_towers(family: str, device: torch.device) -> None:
    """An adapter of this image tower cannot be trained or merged on a GPU."""
    compare(build_tower(family), None, device)


@pytest.mark.parametrize("name", BUILDERS)
def test_text_towers_and_pairs(name: str, device: torch.device) -> None:
    """An adapter of this text tower, or of a tower alone, cannot be trained or merged on a GPU."""
    ids = None if name in LONE and "Vision" in name else ids_of(name)
    compare(build(name), ids, device)
