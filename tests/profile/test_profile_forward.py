"""What a CLIP model costs, by tower and site, and what an adapter adds, against closed formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import clipgraft as cg
from clipgraft.lora.targets import select_sites
from clipgraft.models.clip import as_clip
from clipgraft.models.meta import clip_on_meta
from clipgraft.models.sites import Site
from clipgraft.profile.forward import ClipProfile, costs
from tiny_models import in_every_layout

LAYOUTS = ["CLIP", "CLIP of open_clip 4", "CustomTextCLIP", "CLIPModel"]
# The tiny models: width 32, MLP 128, features 24, 16 patches of 8×8, 7 tokens, batch 3.
TEXT, VISION = 3 * 7, 3 * 17
SITES = {
    "text.token_embedding": 0,
    "text.position_embedding": 0,
    **{f"text.{block}.{role}": TEXT * 32 * 32 for block in range(2) for role in ("q", "k", "v", "out")},
    **{f"text.{block}.{role}": TEXT * 32 * 128 for block in range(2) for role in ("fc1", "fc2")},
    "text.proj": 3 * 32 * 24,
    "vision.patch_embedding": 3 * 16 * 3 * 8 * 8 * 32,
    "vision.position_embedding": 0,
    **{f"vision.{block}.{role}": VISION * 32 * 32 for block in range(2) for role in ("q", "k", "v", "out")},
    **{f"vision.{block}.{role}": VISION * 32 * 128 for block in range(2) for role in ("fc1", "fc2")},
    "vision.proj": 3 * 32 * 24,
}
ATTENTION = {"text": 2 * 2 * 3 * 7 * 7 * 32, "vision": 2 * 2 * 3 * 17 * 17 * 32}


def site_macs(profile: ClipProfile) -> dict[str, int]:
    return {str(cost.site): cost.macs for tower in profile.towers for cost in tower.sites}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sites_cost_the_same_in_every_layout(
    layout: str, tiny_openclip: nn.Module, tiny_openclip_4x: nn.Module
) -> None:
    """The same model costs something else in the other library, or a site has another site's cost."""
    model = in_every_layout(tiny_openclip, tiny_openclip_4x)[layout]
    profile = costs(model, batch=3, text_tokens=7)
    assert site_macs(profile) == SITES
    for tower in profile.towers:
        own = sum(macs for site, macs in SITES.items() if site.startswith(tower.tower))
        assert tower.attention_macs == ATTENTION[tower.tower]
        assert tower.macs == own + ATTENTION[tower.tower]
        assert tower.trace.unpriced == ()
    assert profile.macs == sum(SITES.values()) + sum(ATTENTION.values())
    assert profile.flops > 2 * profile.macs
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert profile.parameters == sum(sizes.values())
    # All but the temperature is in one of the towers.
    assert profile.text.parameters + profile.vision.parameters == profile.parameters - 1


def lora_macs(site: str, r: int) -> int:
    """What an update of rank r costs at a site for the batch above."""
    tower, role = site.split(".")[0], site.rsplit(".", 1)[-1]
    tokens = TEXT if tower == "text" else VISION
    if role == "token_embedding":
        return tokens * r * 32
    if role == "patch_embedding":
        return 3 * 16 * r * (3 * 8 * 8 + 32)
    if role == "proj":
        return 3 * r * (32 + 24)
    if role in ("fc1", "fc2"):
        return tokens * r * (32 + 128)
    return tokens * r * (32 + 32)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("targets", ["text-attention", "linear", "vision.1.q+v", "vision.patch_embedding"])
def test_an_adapter_beside_its_base(
    layout: str, targets: str, tiny_openclip: nn.Module, tiny_openclip_4x: nn.Module
) -> None:
    """The cost of an adapter is hidden in the base's, or counted where it does not act."""
    clip = as_clip(in_every_layout(tiny_openclip, tiny_openclip_4x)[layout])
    cg.apply_lora(clip, r=4, targets=targets)
    profile = costs(clip, batch=3, text_tokens=7)
    assert site_macs(profile) == SITES
    found = {c.site: c.adapter_macs for t in profile.towers for c in t.sites if c.adapter_parameters}
    assert found == {site: lora_macs(str(site), 4) for site in select_sites(clip.sites, targets)}
    assert sum(found.values()) == sum(tower.adapter_macs for tower in profile.towers)
    assert profile.macs == sum(tower.macs + tower.adapter_macs for tower in profile.towers)
    count = cg.count_parameters(clip)
    assert sum(tower.adapter_parameters for tower in profile.towers) == count.lora
    assert profile.text.parameters + profile.vision.parameters == count.total - count.lora - 1
    with cg.lora_disabled(clip):
        assert all(tower.adapter_macs == 0 for tower in costs(clip).towers)


@pytest.mark.parametrize("kwargs", [{"targets": "all"}, {"targets": "linear", "init": "pissa"}])
def test_every_kind_of_update_is_an_adapters_own(kwargs: dict[str, Any], tiny_openclip: nn.Module) -> None:
    """What updates of position tables, or ones with a frozen start, cost is nobody's."""
    cg.apply_lora(tiny_openclip, r=4, **kwargs)
    profile = costs(tiny_openclip, batch=3, text_tokens=7)
    for tower in profile.towers:
        assert sum(cost.adapter_macs for cost in tower.sites) == tower.adapter_macs > 0
        assert tower.adapter_flops >= 2 * tower.adapter_macs


def test_sizes_of_the_published_model() -> None:
    """ViT-L/14-336 comes out with another number of weights, or costs twice as much as it does."""
    overrides = {
        **{"text_config.hidden_size": 768, "text_config.intermediate_size": 3072},
        **{"text_config.num_attention_heads": 12, "projection_dim": 768},
        **{"vision_config.hidden_size": 1024, "vision_config.intermediate_size": 4096},
        **{"vision_config.num_hidden_layers": 24, "vision_config.num_attention_heads": 16},
        **{"vision_config.image_size": 336, "vision_config.patch_size": 14},
    }
    profile = costs(clip_on_meta("emoji", {**overrides, **_STANDARD}))
    assert profile.parameters == 427_944_193
    d, length = 1024, 577
    blocks = 24 * (12 * d * d * length + 2 * length * length * d)
    assert profile.vision.macs == 576 * 3 * 14 * 14 * d + blocks + d * 768


# The embedded default is smaller than CLIP in its text tower too.
_STANDARD = {
    "text_config.vocab_size": 49408,
    "text_config.max_position_embeddings": 77,
    "text_config.num_hidden_layers": 12,
    "text_config.eos_token_id": 49407,
}


def test_sizes_that_a_model_does_not_take(tiny_openclip: nn.Module, tiny_hf: nn.Module) -> None:
    """`--image-size` and `--text-tokens` beyond the model's end in a traceback."""
    for model, limit in ((tiny_openclip, 77), (tiny_hf, 16)):
        with pytest.raises(cg.errors.ModelError, match=f"this model takes 1 to {limit}"):
            costs(model, text_tokens=limit + 1)
        with pytest.raises(cg.errors.ModelError, match="vision tower does not take an input of 1x3x64x40: "):
            costs(model, image_size=(64, 40))
    assert costs(tiny_hf, text_tokens=1).text.input_shape == (1, 1)


def test_half_precision_counts_half_the_bytes(tiny_hf: nn.Module) -> None:
    """Memory of a bf16 model is given as that of an fp32 one."""
    full = costs(tiny_hf)
    half = costs(tiny_hf.to(torch.bfloat16))
    assert half.trace.total.parameter_bytes * 2 == full.trace.total.parameter_bytes
    assert half.trace.forward_bytes * 2 == full.trace.forward_bytes
    assert half.macs == full.macs
    assert half.vision.sites[0].site == Site("vision", None, "patch_embedding")
