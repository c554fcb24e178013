"""The guide's function names, as functions and as methods of `Clip`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import clipgraft as cg
from clipgraft.lora.state import require_lora
from explicit_lora import features, inputs, largest, randomise_lora


@pytest.fixture
def clip(hf_folder: Path) -> cg.Clip:
    return cg.load(hf_folder)


def test_methods_of_clip(clip: cg.Clip, tmp_path: Path) -> None:
    """The guide's `model.apply_lora_to_text_encoder(...)` and the methods it calls next do not exist."""
    assert (
        clip.apply_lora_to_text_encoder(r=4, lora_alpha=8, lora_dropout=0.2, target_modules=["in_proj"]) == 2
    )
    layers = require_lora(clip).layers
    assert {str(site) for site in layers} == {f"text.{block}.{role}" for block in (0, 1) for role in "qkv"}
    assert {(layer.r, layer.scaling, layer.dropout) for layer in layers.values()} == {(4, 2, 0.2)}
    assert clip.count_parameters() == cg.count_parameters(clip)
    assert clip.count_parameters().trainable == 2 * 3 * 4 * (32 + 32)
    randomise_lora(clip.model)
    state = clip.get_lora_state_dict()
    assert set(state) == {f"{site}.lora_{part}" for site in layers for part in "AB"}
    pixels, ids = inputs(clip.model)
    adapted = features(clip.model, pixels, ids)
    clip.save_lora_adapters(tmp_path)
    clip.disable_lora()
    base = features(clip.model, pixels, ids)
    assert largest(adapted, base) > 0.01
    clip.enable_lora()
    assert largest(features(clip.model, pixels, ids), adapted) == 0
    cg.remove_lora(clip)
    clip.load_lora_adapters(tmp_path)
    assert all(torch.equal(value, state[name]) for name, value in clip.get_lora_state_dict().items())
    features(clip.model, pixels, ids)[1].sum().backward()
    assert clip.verify_gradients() == len(state)


def test_functions(tiny_openclip: nn.Module, tmp_path: Path) -> None:
    """The guide's functions do not work on a model of open_clip itself, or have other defaults."""
    assert cg.apply_lora_to_text_encoder(tiny_openclip) == 2
    layers = require_lora(tiny_openclip).layers
    assert {str(site) for site in layers} == {
        f"text.{block}.{role}" for block in (0, 1) for role in ("q", "k", "v", "out")
    }
    assert {(layer.r, layer.alpha, layer.dropout) for layer in layers.values()} == {(16, 16, 0.1)}
    randomise_lora(tiny_openclip)
    state = {name: value.clone() for name, value in cg.get_lora_state_dict(tiny_openclip).items()}
    assert not any(value.requires_grad for value in state.values())
    cg.save_lora_adapters(tiny_openclip, tmp_path)
    randomise_lora(tiny_openclip, seed=5)
    cg.load_lora_adapters(tiny_openclip, tmp_path)
    found = cg.get_lora_state_dict(tiny_openclip)
    assert all(torch.equal(found[name], value) for name, value in state.items())


def test_wrong_module_names(clip: cg.Clip) -> None:
    """A misspelt or empty target_modules quietly adapts the default modules."""
    for modules, message in (
        (["q_proj"], "'q_proj' is unknown; allowed are in_proj, out_proj"),
        ([], "is empty"),
    ):
        with pytest.raises(cg.errors.TargetError, match=message):
            clip.apply_lora_to_text_encoder(target_modules=modules)
