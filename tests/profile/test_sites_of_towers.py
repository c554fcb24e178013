"""Costs by site, and batches with several adapters, on towers other than CLIP's own transformer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import clipgraft as cg
from clipgraft.engine.encoder import encode_rows
from clipgraft.models import DualEncoder, FeatureTable
from clipgraft.models.clip import as_clip
from explicit_lora import largest, randomise_active
from tiny_dual import LONE
from tiny_dual import build as build_dual
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


@pytest.mark.parametrize("name", ["siglip", "siglip2", "SigLIP", "EVA02", "ConvNeXt"])
def test_compact_refuses_them(name: str) -> None:
    """A SigLIP is cut as if it were a CLIP, and comes out broken."""
    with pytest.raises(cg.errors.ModelError, match=r"cannot be cut: it.*Cut a model whose towers are both"):
        cg.compact.compact_model(build(name), text_layers=1)


@pytest.mark.parametrize("name", ["CLIPTextModel", "AltCLIP", "open_clip mT5"])
def test_compact_refuses_other_texts(name: str) -> None:
    """A tower alone, or one that reads texts with another model, ends in a traceback."""
    with pytest.raises(cg.errors.ModelError, match=r"cannot be cut: it.*Cut a model whose towers are both"):
        cg.compact.compact_model(build_dual(name), text_layers=1)


def test_compact_cuts_what_it_names(tiny_openclip: nn.Module, tiny_hf: nn.Module) -> None:
    """The models that a refusal names in its place are refused too."""
    for model in (tiny_openclip, tiny_hf):
        assert len(cg.compact.compact_model(model, text_layers=1).clip.model.text_model.encoder.layers) == 1


def test_t5_reads_texts() -> None:
    """mT5, whose table of relative positions trains with the scores, has no costs, or wrong ones."""
    tokens, dim, inner, mlp, hidden = 77, 32, 24, 48, 28
    found = cg.profile.costs(build_dual("open_clip mT5")).text
    assert found is not None
    macs = {str(cost.site): cost.macs for cost in found.sites}
    for block in range(2):
        for role in ("q", "k", "v", "out"):
            assert macs[f"text.{block}.{role}"] == tokens * dim * inner
        for role in ("fc1", "gate", "fc2"):
            assert macs[f"text.{block}.{role}"] == tokens * dim * mlp
    assert (macs["text.proj_fc1"], macs["text.proj_fc2"]) == (dim * hidden, hidden * 24)
    assert found.attention_macs == 2 * 2 * tokens * tokens * inner
    assert found.macs == sum(macs.values()) + found.attention_macs
    # Words, the first block's 32 relative distances a head, blocks with two norms, a norm, the projection.
    blocks = 2 * (4 * dim * inner + 3 * dim * mlp + 2 * dim)
    assert found.parameters == 100 * dim + 32 * 2 + blocks + dim + hidden * (dim + 24)


def test_a_step_of_t5() -> None:
    """Full tuning of mT5, or LoRA in it, has no costs."""
    full, lora = cg.profile.training_costs(build_dual("open_clip mT5"), ["text.1.q"], r=2)
    assert full.text is not None
    assert lora.text is not None
    products = full.text.forward_macs - 2 * 2 * 77 * 77 * 24
    # Once for each weight and each input, words aside; 5 products of attention for its 2.
    assert full.text.backward_macs == 2 * products + 2 * 5 * 77 * 77 * 24
    assert 0 < lora.text.backward_macs < products
    assert lora.trainable == 2 * (32 + 24)


@pytest.mark.parametrize("name", LONE)
def test_a_tower_alone(name: str) -> None:
    """The text encoder of an image generator has no costs, or those of a tower that it has not."""
    model, tower = build_dual(name), "text" if "Text" in name else "vision"
    profile = cg.profile.costs(model, batch=3)
    (cost,) = profile.towers
    tokens = model.config.max_position_embeddings if tower == "text" else 17
    linear = 2 * tokens * (4 * 32 * 32 + 2 * 32 * 48) + (32 * 24 if "Projection" in name else 0)
    patches = 0 if tower == "text" else 16 * 32 * 3 * 8 * 8
    assert profile.macs == cost.macs == 3 * (linear + patches + 2 * 2 * tokens * tokens * 32)
    assert cost.parameters == profile.parameters == sum(p.numel() for p in model.parameters())
    assert {site.site for site in cost.sites} == set(as_clip(model).sites)
    assert (profile.image_size is None) == (profile.vision is None) == (tower == "text")
    assert (profile.text_tokens is None) == (profile.text is None) == (tower == "vision")
    other = {"image_size": 32} if tower == "text" else {"text_tokens": 9}
    with pytest.raises(cg.errors.ModelError, match=r"but CLIP.* has no (text|vision) tower"):
        cg.profile.costs(model, **other)
    assert cg.profile.inspect(model).profile.macs == cost.macs // 3
    costs = cg.profile.training_costs(model, ["linear"], r=2)
    assert [len(step.towers) for step in costs] == [1, 1]


def test_beside_a_table_of_features() -> None:
    """A tower that trains against a table of features has no costs."""
    text = build_dual("CLIPTextModel")
    joined = DualEncoder(FeatureTable(["a.png"], torch.ones(1, 32)), text)
    profile = cg.profile.costs(joined, text_tokens=16)
    assert profile.vision is None
    assert profile.macs == cg.profile.costs(text, text_tokens=16).macs


def test_patches_of_any_shape() -> None:
    """SigLIP 2 has no costs, or others than those of the SigLIP that it is on a square."""
    found, plain = (cg.profile.costs(build(name)) for name in ("siglip2", "siglip"))
    assert found.vision is not None
    assert plain.vision is not None
    assert found.trace.unpriced == ()
    macs = {str(cost.site): cost.macs for cost in found.vision.sites}
    wanted = {str(cost.site): cost.macs for cost in plain.vision.sites}
    resized = macs.pop("vision.position_embedding")
    assert macs == {site: cost for site, cost in wanted.items() if site != "vision.position_embedding"}
    assert found.vision.macs - resized == plain.vision.macs
