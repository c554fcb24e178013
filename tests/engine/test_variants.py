"""The engine against the model's own forward for every kind of adapter: features and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clipgraft as cg
from clipgraft.engine.encoder import Encoder
from clipgraft.models.clip import as_clip
from explicit_lora import bound, features, inputs, largest, loss_of, randomise_active
from tiny_models import in_every_layout

VARIANTS: dict[str, dict[str, Any]] = {
    "DoRA": {"targets": "all", "use_dora": True},
    "DoRA on some": {"targets": "text.0.k+out,vision.1.v+fc1,vision.proj", "use_dora": True},
    "biases": {"targets": "text.*.q,vision.*.fc2", "bias": "lora_only"},
    "all biases and DoRA": {"targets": "text.1.v,vision.0.fc1", "bias": "all", "use_dora": True},
    "PiSSA": {"targets": "all", "init": "pissa", "use_rslora": True},
    "VeRA": {"targets": "linear", "variant": "vera", "alpha": 3},
    "VeRA, all biases": {"targets": "text.*.q+out", "variant": "vera", "alpha": 3, "bias": "all"},
}


def step(model: nn.Module, outputs: tuple[Tensor, Tensor]) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
    """Gradients of everything that trains, and the features without their graph."""
    model.zero_grad()
    loss_of(outputs).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return grads, (outputs[0].detach(), outputs[1].detach())


@pytest.mark.parametrize("layout", ["CLIP", "CLIP of open_clip 4", "CustomTextCLIP", "CLIPModel"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_is_that_of_the_models_own_forward(
    layout: str, variant: str, checkpointing: bool, tiny_openclip: nn.Module, tiny_openclip_4x: nn.Module
) -> None:
    """A DoRA, bias or PiSSA run trains something else than the adapter computes when it is used."""
    model = in_every_layout(tiny_openclip, tiny_openclip_4x)[layout]
    clip = as_clip(model)
    cg.apply_lora(clip, **{"r": 3, "alpha": 2, **VARIANTS[variant]})
    randomise_active(model)
    pixels, ids = inputs(model)
    encoder = Encoder(clip, grad_checkpointing=checkpointing)
    grads, got = step(model, (encoder.encode_image(pixels), encoder.encode_text(ids)))
    wanted_grads, wanted = step(model, features(model, pixels, ids))
    assert largest(got, wanted) <= bound(wanted)
    assert grads.keys() == wanted_grads.keys()
    for name, grad in wanted_grads.items():
        if grad.numel():
            tolerance = 1e-5 * max(1.0, grad.abs().max().item())
            assert (grads[name] - grad).abs().max() <= tolerance, name
    assert cg.lora.verify_gradients(clip) == sum(1 for g in grads.values() if g.numel())


def test_dropout_acts_on_the_update_alone(tiny_openclip: nn.Module) -> None:
    """With DoRA or biases, dropout in training thins out the base, too."""
    clip = as_clip(tiny_openclip)
    cg.apply_lora(clip, r=2, targets="all", use_dora=True, bias="lora_only", dropout=0.5)
    pixels, ids = inputs(tiny_openclip)
    encoder = Encoder(clip)
    clip.eval()
    wanted = (encoder.encode_image(pixels), encoder.encode_text(ids))
    clip.train()
    torch.manual_seed(0)
    # B is zero: whatever is dropped of the update, it adds nothing.
    assert largest((encoder.encode_image(pixels), encoder.encode_text(ids)), wanted) <= bound(wanted)
