"""An adapter at another strength against weights written out, and against merged ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import clipgraft as cg
from clipgraft.engine.encoder import encode_mixed, prepare_adapter
from clipgraft.lora.state import Adapter, require_lora
from clipgraft.lora.strength import at_strength
from clipgraft.models.clip import Clip, as_clip
from clipgraft.models.family import site_weight
from explicit_lora import inputs, randomise_active

VARIANTS = {
    "lora": {"targets": "all", "r": 3},
    "dora": {"targets": "all", "r": 3, "use_dora": True},
    "vera": {"targets": "linear", "r": 4, "variant": "vera"},
    "pissa": {"targets": "mlp", "r": 2, "init": "pissa"},
    "biases": {"targets": "text.0.*,vision.1.q", "r": 2, "bias": "all"},
}


def attached(model: nn.Module, kind: str) -> tuple[Clip, Adapter]:
    clip = as_clip(model)
    cg.apply_lora(clip, **VARIANTS[kind])
    randomise_active(model)
    return clip, require_lora(clip).chosen()


@pytest.mark.parametrize("strength", [0.3, 1.7, -0.5])
@pytest.mark.parametrize("kind", VARIANTS)
def test_each_weight_moves_by_that_share(tiny_openclip: nn.Module, kind: str, strength: float) -> None:
    """A slider at 0.3 gives something else than 0.3 of the change, for variants that rescale above all."""
    clip, adapter = attached(tiny_openclip, kind)
    scaled = at_strength(clip, adapter, strength)
    prepare_adapter(clip, adapter)
    ahead = at_strength(clip, adapter, strength)
    for site, ref in clip.site_refs.items():
        if site not in adapter.layers or not adapter.layers[site].r:
            continue
        weight = torch.randn(ref.shape)
        scaled_here = at_strength(clip, adapter, strength).layers[site]
        if not adapter.layers[site].rescales:  # those that do are made for the base's own weight
            wanted = weight + strength * (adapter.layers[site].folded(weight) - weight)
            assert (scaled_here.folded(weight) - wanted).abs().max() < 1e-5
    pixels, ids = inputs(tiny_openclip)
    rows = torch.arange(3)
    got = [encode_mixed(clip, tower, x, [(scaled, rows)]) for tower, x in both(pixels, ids)]
    got_ahead = [encode_mixed(clip, tower, x, [(ahead, rows)]) for tower, x in both(pixels, ids)]
    adapter.prepared = None
    cg.merge_lora(clip, {"default": strength})
    with torch.no_grad():
        wanted = (clip.encode_text(ids), clip.encode_image(pixels))
    for found, same, true in zip(got, got_ahead, wanted, strict=True):
        assert (found - true).abs().max() <= 1e-5 * max(1, float(true.abs().max()))
        assert (same - true).abs().max() <= 1e-5 * max(1, float(true.abs().max()))


def both(pixels: torch.Tensor, ids: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    return [("text", ids), ("vision", pixels)]


def test_factors_are_shared_and_the_adapter_stays_as_it_was(tiny_openclip: nn.Module) -> None:
    """Every position of a slider takes the memory of another adapter, or moves the adapter for all others."""
    clip, adapter = attached(tiny_openclip, "lora")
    scalings = [layer.scaling for layer in adapter.layers.values()]
    scaled = at_strength(clip, adapter, 0.5)
    assert {p.data_ptr() for p in scaled.parameters()} == {p.data_ptr() for p in adapter.parameters()}
    assert [layer.scaling for layer in adapter.layers.values()] == scalings
    assert at_strength(clip, adapter, 1.0) is adapter


@pytest.mark.parametrize("strength", [1.0001, 2.0])
def test_an_output_may_vanish(tiny_openclip: nn.Module, strength: float) -> None:
    """An output that is divided by nearly zero fills features with rounding errors, or with NaN."""
    clip, adapter = attached(tiny_openclip, "dora")
    refs = clip.site_refs
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.get_parameter("lora_magnitude")[::2] = 0
            layer.get_parameter("lora_magnitude")[1::2] *= 0.5  # at strength 2 the factor is 0
    scaled = at_strength(clip, adapter, strength)
    for site, layer in adapter.layers.items():
        weight = site_weight(clip.model, refs[site]).detach()
        wanted = weight + strength * (layer.folded(weight) - weight)
        assert (scaled.layers[site].folded(weight) - wanted).abs().max() < 1e-5
