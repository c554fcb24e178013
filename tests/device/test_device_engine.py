"""Features, gradients, mixed adapters and merging on the stand-in device, against the CPU's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clipgraft as cg
from clipgraft.engine.encoder import Encoder
from clipgraft.lora.state import require_lora
from clipgraft.models.clip import as_clip
from explicit_lora import (
    bound,
    explicit_run,
    features,
    inputs,
    largest,
    loss_of,
    randomise_active,
    randomise_lora,
)
from standin_device import recorded_waits
from tiny_siglip import build_siglip

LAYOUTS = ("tiny_openclip", "tiny_openclip_4x", "tiny_hf")
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"targets": "all", "r": 3, "alpha": 5},
    "text-attention": {"targets": "text-attention", "r": 4},
    "dora": {"targets": "all", "r": 4, "use_dora": True},
    "vera": {"targets": "text-attention", "r": 4, "variant": "vera"},
    "biases": {"targets": "text.*.q,v,fc1", "r": 2, "bias": "all"},
    "rslora": {"targets": "linear", "r": 4, "use_rslora": True},
}


@pytest.fixture
def base(request: pytest.FixtureRequest) -> nn.Module:
    """The model of the layout that the test is parametrised with."""
    model: nn.Module = request.getfixturevalue(request.param)
    return model


def on_cpu(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.detach().cpu() for tensor in tensors)


@pytest.mark.parametrize("base", LAYOUTS, indirect=True)
def test_features_and_gradients_are_those_of_the_explicit_model(
    base: nn.Module, device: torch.device
) -> None:
    """The engine on a GPU computes something else than the formula W + s·B·A does, or not at all."""
    model = copy.deepcopy(base)
    cg.apply_lora(model, targets="all", r=3, alpha=5)
    updates = randomise_lora(model)
    model.to(device)
    pixels, ids = inputs(base, batch=6)
    encoder = Encoder(as_clip(model))
    ours = encoder.encode_image(pixels.to(device)), encoder.encode_text(ids)
    leaves = {site: (a.requires_grad_(), b.requires_grad_(), s) for site, (a, b, s) in updates.items()}
    wanted = explicit_run(base, leaves, lambda m: features(m, pixels, ids))
    assert largest(on_cpu(*ours), on_cpu(*wanted)) <= bound(wanted)
    loss_of((ours[0].cpu(), ours[1].cpu())).backward()
    loss_of(wanted).backward()
    for site, layer in require_lora(model).layers.items():
        a, b, _ = leaves[str(site)]
        got = on_cpu(layer.lora_A.grad, layer.lora_B.grad)
        assert largest(got, (a.grad, b.grad)) <= bound((a.grad, b.grad)), site


@pytest.mark.parametrize("base", LAYOUTS, indirect=True)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_models_own_forward_and_merging(base: nn.Module, variant: str, device: torch.device) -> None:
    """An adapted model's own `encode_text`, or its merged weights, differ from the CPU's on a GPU."""
    model = copy.deepcopy(base)
    cg.apply_lora(model, **VARIANTS[variant])
    randomise_active(model)
    pixels, ids = inputs(base)
    given = pixels.to(device), ids.to(device)
    with torch.no_grad():
        wanted = features(model, pixels, ids)
        got = features(model.to(device), *given)
        cg.merge_lora(model)
        merged = features(model, *given)
    assert largest(on_cpu(*got), wanted) <= bound(wanted)
    assert largest(on_cpu(*merged), wanted) <= bound(wanted)
    cg.unmerge_lora(model)
    cg.remove_lora(model)
    assert all(torch.equal(model.state_dict()[name].cpu(), w) for name, w in base.state_dict().items())


@pytest.mark.parametrize("base", [*LAYOUTS, "siglip"])
@pytest.mark.parametrize("tower", ["text", "vision"])
def test_mixed_rows_equal_single_runs(
    base: str, tower: str, device: torch.device, request: pytest.FixtureRequest
) -> None:
    """A row of a mixed batch on a GPU gets another adapter's features, or waits for the GPU on its way."""
    model = build_siglip() if base == "siglip" else request.getfixturevalue(base)
    clip = cg.Clip.over(as_clip(model))
    for seed, (name, options) in enumerate(VARIANTS.items()):
        cg.apply_lora(clip.model, **options, name=name)
        randomise_active(clip.model, seed)
    names: list[str | None] = [None, *VARIANTS, "dora", None, "plain", "rslora"]
    rows = inputs(clip.model, batch=len(names))[tower == "text"]
    encode = clip.encode_text if tower == "text" else clip.encode_image
    wanted = encode(rows, adapters=names)
    clip.to(device)
    encode = clip.encode_text if tower == "text" else clip.encode_image
    encode(rows, adapters=names)  # which prepares adapters
    with recorded_waits() as waits:
        got = encode(rows, adapters=names)
    assert got.device == device
    assert largest(on_cpu(got), (wanted,)) <= bound((wanted,))
    assert waits == []


@pytest.mark.parametrize("made_on", ["cpu", "device"])
def test_an_adapter_goes_from_one_device_to_the_other(
    made_on: str, tiny_hf: nn.Module, device: torch.device, tmp_path: Path
) -> None:
    """An adapter that a GPU saved cannot be loaded on a CPU, or the other way round."""
    first, second = copy.deepcopy(tiny_hf), copy.deepcopy(tiny_hf)
    (first if made_on == "device" else second).to(device)
    cg.apply_lora(first, targets="all", r=2)
    randomise_active(first)
    cg.save_adapter(first, tmp_path / "adapter")
    cg.load_adapter(second, tmp_path / "adapter", name="again")
    pixels, ids = inputs(tiny_hf)
    with torch.no_grad():
        one, other = (
            features(model, *(t.to(next(model.parameters()).device) for t in (pixels, ids)))
            for model in (first, second)
        )
    assert largest(on_cpu(*one), on_cpu(*other)) <= 1e-5
