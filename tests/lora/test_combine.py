"""Weighted sums of adapters."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import clipgraft as cg
from clipgraft.lora.combine import cut
from clipgraft.lora.state import require_lora
from clipgraft.models.clip import as_clip
from explicit_lora import (
    bound,
    explicit_model,
    features,
    inputs,
    largest,
    randomise_active,
    randomise_lora,
    run,
)

layouts = pytest.mark.parametrize("layout", ["CLIP", "CLIP of open_clip 4", "CustomTextCLIP", "CLIPModel"])


@layouts
def test_a_sum_is_the_explicit_sum(model: nn.Module) -> None:
    """Two adapters combined are not W + w₁·ΔW₁ + w₂·ΔW₂."""
    base = copy.deepcopy(model)
    cg.apply_lora(model, r=3, alpha=2, targets="all", name="one")
    one = randomise_lora(model, seed=1)
    cg.apply_lora(
        model, r=2, alpha=5, targets="attention,vision.patch_embedding", use_rslora=True, name="two"
    )
    two = randomise_lora(model, seed=2)
    made = cg.combine_adapters(model, {"one": 0.7, "two": -1.5}, "sum")
    explicit = explicit_model(base, {site: (a, b, 0.7 * s) for site, (a, b, s) in one.items()})
    explicit = explicit_model(explicit, {site: (a, b, -1.5 * s) for site, (a, b, s) in two.items()})
    wanted = run(explicit)
    assert largest(run(model), wanted) <= bound(wanted)
    assert (made.error, set(made.ranks.values())) == (0.0, {3, 5})
    assert require_lora(model).active == "sum"
    cg.merge_lora(model, {"one": 0.7, "two": -1.5})
    assert largest(run(model), wanted) <= bound(wanted)


@pytest.mark.parametrize("layout", ["CLIP", "CLIPModel"])
def test_dora_and_biases_and_the_temperature_are_summed_too(model: nn.Module) -> None:
    """A sum with a DoRA adapter leaves its magnitudes out."""
    cg.apply_lora(model, r=3, targets="all", use_dora=True, name="dora")
    randomise_active(model, 1)
    cg.apply_lora(model, r=2, targets="text.*.fc1", bias="all", train_logit_scale=True, name="bias")
    randomise_active(model, 2)
    scale = as_clip(model).logit_scale.item()
    cg.set_adapter(model, None)
    base = as_clip(model).logit_scale.item()
    cg.merge_lora(model, {"dora": 0.5, "bias": 2.0})
    wanted = run(model)
    cg.unmerge_lora(model)
    cg.combine_adapters(model, {"dora": 0.5, "bias": 2.0}, "sum")
    assert largest(run(model), wanted) <= bound(wanted)
    assert math.isclose(as_clip(model).logit_scale.item(), base + 2 * (scale - base), rel_tol=1e-6)
    cg.set_adapter(model, "bias")
    assert as_clip(model).logit_scale.item() == scale


@pytest.mark.parametrize("layout", ["CLIP", "CLIPModel"])
def test_the_error_of_a_cut_is_what_is_lost(model: nn.Module) -> None:
    """The printed error of a smaller rank is not that of the adapter one gets."""
    for name in ("one", "two"):
        cg.apply_lora(model, r=4, targets="all", name=name)
        randomise_lora(model, seed=len(name))
    cg.combine_adapters(model, {"one": 1.0, "two": 1.0}, "exact", activate=False)
    made = cg.combine_adapters(model, {"one": 1.0, "two": 1.0}, "small", rank=3)
    adapters = require_lora(model).adapters
    lost = total = 0.0
    for site, layer in adapters["exact"].layers.items():
        exact, small = layer.delta_weight(), adapters["small"].layers[site].delta_weight()
        lost, total = lost + (exact - small).square().sum().item(), total + exact.square().sum().item()
        share = ((exact - small).norm() / exact.norm()).item()
        assert math.isclose(made.errors[site], share, rel_tol=1e-3, abs_tol=1e-6), site
    assert math.isclose(made.error, math.sqrt(lost / total), rel_tol=1e-3)
    assert set(made.ranks.values()) == {3}


@pytest.mark.parametrize("layout", ["CLIP", "CLIPModel"])
def test_an_average_of_seeds(model: nn.Module) -> None:
    """The average of three adapters is not the mean of their s·B·A, or its cut not the truncated SVD."""
    thirds, deltas = {}, []
    for seed, name in enumerate(("a", "b", "c")):
        cg.apply_lora(model, r=2, alpha=3, targets="attention,vision.patch_embedding,vision.proj", name=name)
        updates = randomise_lora(model, seed=seed)
        deltas.append({site: s * b.flatten(1) @ a.flatten(1) for site, (a, b, s) in updates.items()})
        thirds[name] = 1 / 3
    whole = cg.combine_adapters(model, thirds, "whole")
    small = cg.combine_adapters(model, thirds, "small", rank=2)
    adapters = require_lora(model).adapters
    assert set(whole.ranks.values()) == {6}
    assert set(small.ranks.values()) == {2}
    for site in whole.ranks:
        mean = torch.stack([delta[str(site)] for delta in deltas]).mean(0)
        u, s, v = torch.linalg.svd(mean, full_matrices=False)
        for name, wanted in (("whole", mean), ("small", (u[:, :2] * s[:2]) @ v[:2])):
            found = adapters[name].layers[site].delta_weight().flatten(1)
            assert (found - wanted).abs().max() <= 1e-5 * mean.abs().max(), (site, name)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31))
def test_a_cut_is_the_nearest_of_its_rank(out: int, inner: int, many: int, few: int, seed: int) -> None:
    """A combination that is cut down is further from the sum than it has to be."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((many, inner), (out, many))
    )
    small_a, small_b = cut(a, b, few)
    assert small_a.shape[0] == small_b.shape[1] <= max(few, min(many, few))
    values = torch.linalg.svdvals(b @ a)
    best = values[few:].square().sum().sqrt()
    assert torch.isclose((b @ a - small_b @ small_a).norm(), best, atol=1e-6 * (1 + values[0]))


def test_what_is_refused(tiny_openclip: nn.Module) -> None:
    """A misspelt name or a weight that is no number makes a broken adapter."""
    cg.apply_lora(tiny_openclip, name="vi")
    for weights, name, options, error, message in (
        ({"en": 1.0}, "sum", {}, cg.errors.AdapterError, "no adapter 'en' on this model: loaded are 'vi'"),
        ({"vi": 1.0}, "vi", {}, cg.errors.AdapterError, "the name 'vi' is taken"),
        ({"vi": 1.0}, "a/b", {}, cg.errors.AdapterError, "adapter name 'a/b'"),
        ({}, "sum", {}, cg.errors.ConfigError, "no adapter is given"),
        ({"vi": math.nan}, "sum", {"rank": 0}, cg.errors.ConfigError, "weight of 'vi' is nan; rank is 0"),
    ):
        with pytest.raises(error, match=message):
            cg.combine_adapters(tiny_openclip, weights, name, **options)
    assert list(require_lora(tiny_openclip).adapters) == ["vi"]


def test_named_adapters_are_switched(tiny_hf: nn.Module) -> None:
    """Setting an adapter leaves another one acting beside it, or its weights training."""
    outputs: dict[str | None, tuple[Tensor, Tensor]] = {None: run(tiny_hf)}
    for seed, name in enumerate(("vi", "med")):
        cg.apply_lora(tiny_hf, targets="all", name=name)
        randomise_lora(tiny_hf, seed=seed)
        outputs[name] = run(tiny_hf)
    assert largest(outputs["vi"], outputs["med"]) > 0.01
    for name in ("vi", None, "med", "vi"):
        cg.set_adapter(tiny_hf, name)
        assert largest(run(tiny_hf), outputs[name]) == 0
        trained = {n.rsplit(".", 2)[1] for n, p in tiny_hf.named_parameters() if p.requires_grad}
        assert trained == ({name} if name else set())
    pixels, ids = inputs(tiny_hf)
    cg.set_adapter(tiny_hf, "med")
    sum(t.sum() for t in features(tiny_hf, pixels, ids)).backward()
    assert cg.lora.verify_gradients(tiny_hf) == sum(1 for p in tiny_hf.parameters() if p.requires_grad)
    with pytest.raises(cg.errors.AdapterError, match="no adapter 'fr' on this model: loaded are 'vi', 'med'"):
        cg.set_adapter(tiny_hf, "fr")
    cg.remove_lora(tiny_hf, "med")
    assert largest(run(tiny_hf), outputs[None]) == 0
    with pytest.raises(
        cg.errors.AdapterError, match="no adapter is active: call set_adapter with one of 'vi'"
    ):
        cg.adapters.lora_state_dict(tiny_hf)
    cg.remove_lora(tiny_hf, "vi")
    assert not any("lora" in name for name, _ in tiny_hf.named_parameters())


def test_loading_again_replaces_at_once(tiny_hf: nn.Module, tmp_path: Path) -> None:
    """Loading a newer version of an adapter leaves the older one acting, or switches another one off."""
    for seed, name in enumerate(("vi", "med")):
        cg.apply_lora(tiny_hf, r=2 + seed, targets="attention", name=name, train_logit_scale=True)
        randomise_active(tiny_hf, seed)
        cg.save_adapter(tiny_hf, tmp_path / name)
    med, scale = run(tiny_hf), as_clip(tiny_hf).logit_scale.item()
    cg.set_adapter(tiny_hf, "vi")
    vi, other_scale = run(tiny_hf), as_clip(tiny_hf).logit_scale.item()
    cg.load_adapter(tiny_hf, tmp_path / "med", name="vi", activate=False)  # the active one is replaced
    assert require_lora(tiny_hf).active == "vi"
    assert largest(run(tiny_hf), med) == 0
    assert as_clip(tiny_hf).logit_scale.item() == scale != other_scale
    cg.load_adapter(tiny_hf, tmp_path / "vi", name="med", activate=False)
    assert largest(run(tiny_hf), med) == 0
    cg.disable_lora(tiny_hf)
    cg.load_adapter(tiny_hf, tmp_path / "vi", name="third")
    assert require_lora(tiny_hf).active == "third"
    assert largest(run(tiny_hf), vi) == 0
    assert as_clip(tiny_hf).logit_scale.item() == other_scale


@pytest.mark.parametrize("name", ["half", "train", "training", "to", "active", "forward", "1", "vi-2+en"])
def test_any_name_will_do(name: str, tiny_openclip: nn.Module) -> None:
    """An adapter with an everyday name cannot be loaded, or breaks `model.half()` and `model.train()`."""
    base = run(tiny_openclip)
    cg.apply_lora(tiny_openclip, targets="all", name=name)
    randomise_lora(tiny_openclip)
    adapted = run(tiny_openclip)
    assert largest(adapted, base) > 0.01
    tiny_openclip.train()
    twin = copy.deepcopy(tiny_openclip).eval()
    twin.load_state_dict(tiny_openclip.state_dict())
    assert largest(run(twin), adapted) == 0
    assert all(p.dtype == torch.float16 for p in twin.half().parameters())
    cg.remove_lora(tiny_openclip.eval(), name)
    assert largest(run(tiny_openclip), base) == 0
