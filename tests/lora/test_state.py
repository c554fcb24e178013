"""What must train trains, nothing else does, and the numbers of both are right."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

import clipgraft as cg
from clipgraft.lora.state import require_lora
from explicit_lora import features, inputs, loss_of


def backward(model: nn.Module) -> None:
    loss_of(features(model, *inputs(model))).backward()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            lambda model: model.token_embedding.requires_grad_(True),
            "1 weights of the base .* token_embedding",
        ),
        (lambda model: model.requires_grad_(True), "weights of the base are not frozen"),
        (
            lambda model: setattr(require_lora(model).slots["text.1.v"], "active", None),
            "2 trainable weights got no gradient.*enable_lora",
        ),
        (lambda model: layer_of(model, "text.1.k").requires_grad_(False), "got no gradient"),
    ],
)
def test_verify_gradients_finds(tiny_openclip: nn.Module, fault: Callable, message: str) -> None:
    """A base that trains along, or an adapter that does not train, goes unnoticed until the run is over."""
    cg.apply_lora(tiny_openclip)
    fault(tiny_openclip)
    backward(tiny_openclip)
    with pytest.raises(cg.errors.TrainingError, match=message):
        cg.lora.verify_gradients(tiny_openclip)


def layer_of(model: nn.Module, site: str) -> nn.Module:
    return require_lora(model).layers[cg.models.Site.parse(site)]


def test_verify_gradients_without_lora(tiny_openclip: nn.Module) -> None:
    """Full fine-tuning with a locked tower is refused, or a gradient in the locked tower is not seen."""
    tiny_openclip.logit_scale.requires_grad_(False)
    backward(tiny_openclip)
    assert cg.lora.verify_gradients(tiny_openclip) == sum(p.requires_grad for p in tiny_openclip.parameters())
    tiny_openclip.visual.requires_grad_(False)
    with pytest.raises(cg.errors.TrainingError, match="have gradients"):
        cg.lora.verify_gradients(tiny_openclip)


def test_counts(tiny_openclip: nn.Module) -> None:
    """The reported numbers of weights are wrong."""
    total = sum(p.numel() for p in tiny_openclip.parameters())
    cg.apply_lora(tiny_openclip, r=3, targets="text.0.q,text.0.fc1,vision.proj")
    lora = 3 * (32 + 32) + 3 * (32 + 128) + 3 * (32 + 24)
    assert cg.count_parameters(tiny_openclip) == type(cg.count_parameters(tiny_openclip))(
        total=total + lora, trainable=lora, lora=lora
    )
