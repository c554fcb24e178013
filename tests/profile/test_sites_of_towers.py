"""Costs by site, and batches with several adapters, on towers other than CLIP's own transformer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import clipgraft as cg
from clipgraft.engine.encoder import encode_rows
from clipgraft.models.clip import as_clip
from explicit_lora import largest, randomise_active
from tiny_siglip import build_siglip, build_siglip2
from tiny_towers import build_tower
from weight_places import ids, pixels


def build(name: str) -> nn.Module:
    return {"siglip": build_siglip, "siglip2": build_siglip2}.get(name, lambda: build_tower(name))()


def costs_by_site(name: str) -> dict[str, int]:
    (vision,) = [tower for tower in cg.profile.costs(build(name)).towers if tower.tower == "vision"]
    return {str(cost.site): cost.macs for cost in vision.sites}


def test_macs_of_rows_and_heads() -> None:
    """The costs of q, k and v are those of their fused Linear thrice, or the pooling head's are missing."""
    for name in ("SigLIP", "siglip"):
        found = costs_by_site(name)
        tokens, dim = 16, 32
        assert found["vision.0.q"] == found["vision.1.v"] == tokens * dim * dim, name
        assert found["vision.pool_out"] == dim * dim, name
        heads = sum(found[f"vision.pool_{role}"] for role in "qkv")
        assert heads == (2 * tokens + 1) * dim * dim, name
    found = costs_by_site("EVA02")
    assert found["vision.0.gate"] == found["vision.0.fc1"] == 17 * 32 * 85
    found = costs_by_site("ConvNeXt")
    assert found["vision.0.conv_dw"] == 8 * 8 * 8 * 49
    assert found["vision.0.fc1"] == 8 * 8 * 8 * 32


@pytest.mark.parametrize("name", ["siglip", "siglip2", "SigLIP", "EVA01", "ConvNeXt", "ResNet"])
def test_every_row_with_its_own_adapter(name: str) -> None:
    """A batch with several adapters gives a row the features of another adapter."""
    clip = as_clip(build(name))
    for adapter, seed in (("a", 0), ("b", 1)):
        cg.apply_lora(clip, targets="all", r=2, name=adapter)
        randomise_active(clip.model, seed)
    names = ["b", None, "a"]
    images = pixels(clip.family.image_size(clip.model)[0])
    with torch.no_grad():
        mixed = encode_rows(clip, "vision", images, names), encode_rows(clip, "text", ids(), names)
        wanted: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for row, adapter in enumerate(names):
            cg.set_adapter(clip, adapter)
            wanted[0].append(clip.encode_image(images[row : row + 1]))
            wanted[1].append(clip.encode_text(ids()[row : row + 1]))
        assert largest(mixed, (torch.cat(wanted[0]), torch.cat(wanted[1]))) <= 1e-5


def test_compact_refuses_them() -> None:
    """A SigLIP is cut as if it were a CLIP, and comes out broken."""
    for name in ("siglip", "SigLIP", "EVA02"):
        with pytest.raises(cg.errors.ModelError, match=r"cannot be cut|cannot leave its own"):
            cg.compact.compact_model(build(name), text_layers=1)
