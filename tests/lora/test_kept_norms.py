"""DoRA's norms are computed once while nothing changes, and again after any change."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipgraft.lora.config import LoraConfig
from clipgraft.lora.variants import Dora
from clipgraft.models.sites import Site, SiteRef

CHANGES: dict[str, Callable[[Any, nn.Parameter], object]] = {
    "W in place": lambda layer, weight: weight.mul_(2),
    "W replaced": lambda layer, weight: setattr(weight, "data", torch.randn(6, 4)),
    "W rounded and widened again": lambda layer, weight: [
        setattr(weight, "data", weight.data.to(dtype)) for dtype in (torch.bfloat16, torch.float32)
    ],
    "A in place": lambda layer, weight: layer.lora_A.add_(1),
    "B by load_state_dict": lambda layer, weight: layer.load_state_dict(
        {**layer.state_dict(), "lora_B": torch.randn(6, 2)}
    ),
    "B replaced": lambda layer, weight: setattr(layer, "lora_B", nn.Parameter(torch.randn(6, 2))),
    "the strength": lambda layer, weight: setattr(layer, "scaling", 3.0),
    "W in another type": lambda layer, weight: setattr(weight, "data", weight.data.half()),
}


def made() -> tuple[Any, nn.Parameter]:
    """A DoRA of rank 2 that has an effect on a W of (6, 4)."""
    torch.manual_seed(0)
    ref = SiteRef(Site.parse("text.0.q"), "q_proj", "weight", "linear", (6, 4))
    layer = Dora(ref, 2, 2.0, LoraConfig(r=2, use_dora=True))
    with torch.no_grad():
        layer.lora_B.normal_()
    return layer, nn.Parameter(torch.randn(6, 4), requires_grad=False)


def explicit(layer: Any, weight: Tensor) -> Tensor:
    """The norms by the formula."""
    moved = weight.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    return moved.pow(2).sum(1).sqrt().detach()


def assert_right(layer: Any, weight: Tensor) -> None:
    """The layer's norms are those of the formula."""
    torch.testing.assert_close(layer.norm(weight).double(), explicit(layer, weight), rtol=1e-5, atol=0)


def computations(layer: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by an element whenever W + s·B·A is computed."""
    calls: list[int] = []
    moved = layer.moved

    def counted(weight: Tensor) -> Tensor:
        calls.append(1)
        return moved(weight)

    monkeypatch.setattr(layer, "moved", counted)
    return calls


@pytest.mark.parametrize("trains", [True, False])
def test_norms_are_computed_once_while_nothing_changes(trains: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every request to a DoRA adapter would pay for the norms of all its weights."""
    layer, weight = made()
    layer.requires_grad_(trains)
    calls = computations(layer, monkeypatch)
    with torch.inference_mode():
        first = layer.norm(weight)
    with torch.no_grad():
        assert layer.norm(weight.view(6, 4)).equal(first)
    assert len(calls) == 1
    assert_right(layer, weight)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("trains", [True, False])
def test_every_change_is_seen(change: str, trains: bool) -> None:
    """An adapter would go on computing with the norms of the weights before."""
    layer, weight = made()
    layer.requires_grad_(trains)
    with torch.no_grad():
        layer.norm(weight)
        CHANGES[change](layer, weight)
        assert_right(layer, weight)


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_a_step_of_an_optimizer_is_seen(options: dict[str, bool]) -> None:
    """DoRA would train with the norms of its first step."""
    layer, weight = made()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, **options)
    for _ in range(2):
        loss = layer.rescale(weight).sum() + layer.lora_A.sum() + layer.lora_B.sum()
        with torch.no_grad():
            layer.norm(weight)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            assert_right(layer, weight)
        assert_right(layer, weight)


def test_a_new_weight_at_the_address_of_an_old_one_is_seen() -> None:
    """A weight that is made anew for each call would be taken for the first."""
    layer, _ = made()
    layer.requires_grad_(False)
    for number in range(20):
        weight = torch.full((6, 4), float(number))
        assert_right(layer, weight)
        del weight


def test_norms_that_inference_kept_can_be_trained_with() -> None:
    """Training after an evaluation would end with an error about inference tensors."""
    layer, weight = made()
    with torch.inference_mode():
        layer.norm(weight)
    layer.rescale(weight).sum().backward()
    assert layer.lora_magnitude.grad is not None


def test_autocast_has_norms_of_its_own() -> None:
    """What an evaluation in bf16 rounded would be used in fp32."""
    layer, weight = made()
    layer.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        layer.norm(weight)
    assert_right(layer, weight)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_keeps_nothing_of_the_original(copied: Callable[[Any], Any]) -> None:
    """A copied or pickled model would crash, or hold the norms of the model that it was copied from."""
    layer, weight = made()
    layer.requires_grad_(False)
    layer.norm(weight)
    other = copied(layer)
    with torch.no_grad():
        other.lora_B.zero_()
    assert_right(other, weight)
    assert_right(layer, weight)
