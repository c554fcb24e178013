"""Folding updates into the base's weights and taking them out again."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

import clipgraft as cg
from clipgraft.lora.state import require_lora
from clipgraft.models.clip import as_clip
from explicit_lora import bound, explicit_model, largest, randomise_active, randomise_lora, run

LAYOUTS = ("CLIP", "CLIP of open_clip 4", "CustomTextCLIP", "CLIPModel")
layouts = pytest.mark.parametrize("layout", LAYOUTS)
VARIANTS = {
    "plain": {"targets": "all"},
    "dora": {"targets": "all", "use_dora": True},
    "biases": {"targets": "text.*.q+fc2,vision.0.*", "bias": "all", "use_rslora": True},
    "pissa": {"targets": "all", "init": "pissa"},
    "temperature": {"targets": "attention", "train_logit_scale": True},
}
variants = pytest.mark.parametrize("variant", VARIANTS)


def bits(model: nn.Module) -> dict[str, bytes]:
    """Every bit of the base, under the names of a model without adapters."""
    clip = as_clip(model)
    weights = dict(clip.family.canonical_weights(clip.model))
    flat = {name: t.detach().contiguous().view(-1) for name, t in weights.items()}
    return {name: t.view(torch.uint8).numpy().tobytes() for name, t in flat.items()}


@layouts
@variants
def test_merged_is_unmerged(model: nn.Module, variant: str) -> None:
    """A merged model answers differently from the adapter it was made of, or unmerging leaves a trace."""
    before, scale = bits(model), as_clip(model).logit_scale.item()
    cg.apply_lora(model, r=3, alpha=2, **VARIANTS[variant])
    randomise_active(model)
    wanted, own_scale = run(model), as_clip(model).logit_scale.item()
    cg.merge_lora(model)
    assert bits(model) != before
    assert largest(run(model), wanted) <= bound(wanted)
    assert as_clip(model).logit_scale.item() == own_scale
    cg.unmerge_lora(model)
    assert {n for n, b in bits(model).items() if b != before[n]} <= {"logit_scale"}
    assert largest(run(model), wanted) == 0
    cg.disable_lora(model)
    assert bits(model) == before
    assert as_clip(model).logit_scale.item() == scale


@layouts
def test_merged_is_the_explicit_model(model: nn.Module) -> None:
    """Merging only switches the adapter off, or folds in something else than s·B·A."""
    base = copy.deepcopy(model)
    cg.apply_lora(model, r=3, alpha=2, targets="all")
    updates = randomise_lora(model)
    cg.merge_lora(model)
    wanted = run(explicit_model(base, updates))
    assert largest(run(model), wanted) <= bound(wanted)
    assert largest(run(base), wanted) > 0.01


@layouts
@pytest.mark.parametrize("variant", ["plain", "dora"])
def test_bf16_bases_are_rounded_once(model: nn.Module, variant: str) -> None:
    """On a bf16 base the update is computed in bf16 too, and small ones are lost before they are added."""
    cg.apply_lora(model, r=3, alpha=2, **VARIANTS[variant])
    randomise_active(model)
    exact = copy.deepcopy(model)
    for clip in (exact, model):
        for parameter in clip.parameters():
            parameter.data = parameter.data.bfloat16().float()
    model.to(torch.bfloat16)
    for layer in require_lora(model).layers.values():
        layer.float()
    before = bits(model)
    cg.merge_lora(exact)
    cg.merge_lora(model)
    ours, wanted = (
        dict(as_clip(model).family.canonical_weights(model)),
        dict(as_clip(exact).family.canonical_weights(exact)),
    )
    for name, weight in ours.items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, wanted[name].bfloat16()), name
    for got, full in zip(run(model), run(exact), strict=True):
        # bf16 keeps eight bits; a feature is a sum of roundings of that size.
        assert (got.float() - full).norm() <= 0.03 * full.norm()
    cg.unmerge_lora(model)
    assert bits(model) == before


@pytest.mark.parametrize("layout", ["CLIP", "CLIPModel"])
def test_every_bit_after_several_adapters_and_saves(model: nn.Module, layout: str, tmp_path: Path) -> None:
    """After merging one adapter and another, saving, loading or copying, the base is no longer the base."""
    before, base_features = bits(model), run(model)
    folders = {}
    for seed, name in enumerate(("plain", "dora", "biases")):
        cg.apply_lora(model, r=2, name=name, **VARIANTS[name])
        randomise_active(model, seed)
        folders[name] = cg.save_adapter(model, tmp_path / name, name=name)
    for names in ("plain", "dora", {"plain": 0.5, "biases": -1.0}, ["plain", "dora", "biases"], None):
        cg.merge_lora(model, names)
        assert bits(model) != before
        merged = run(model)
        twins = [copy.deepcopy(model)]
        if layout == "CLIPModel":  # torch does not pickle parametrised modules, as a position table becomes
            twins.append(pickle.loads(pickle.dumps(model)))
        torch.save(model.state_dict(), tmp_path / "state.pt")
        for twin in twins:
            twin.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
            assert largest(run(twin), merged) == 0
            cg.unmerge_lora(twin)
            assert bits(twin) == before
        cg.save_adapter(model, tmp_path / "while merged", name="plain")
        cg.unmerge_lora(model)
        assert bits(model) == before
    for name in ("plain", "dora", "biases"):
        cg.load_adapter(model, folders[name], name)
    cg.load_adapter(model, tmp_path / "while merged", "again")
    assert bits(model) == before
    cg.merge_lora(model)
    cg.remove_lora(model)
    assert bits(model) == before
    assert largest(run(model), base_features) == 0


@pytest.mark.parametrize("layout", ["CLIP", "CLIPModel"])
def test_what_makes_no_sense_while_merged(model: nn.Module, tmp_path: Path) -> None:
    """Weights are merged twice, or a run trains an adapter whose update stands in the base as well."""
    with pytest.raises(cg.errors.AdapterError, match="carries no LoRA"):
        cg.merge_lora(model)
    cg.apply_lora(model, targets="attention")
    folder = cg.save_adapter(model, tmp_path / "a")
    with pytest.raises(cg.errors.AdapterError, match="nothing is merged"):
        cg.unmerge_lora(model)
    with pytest.raises(cg.errors.AdapterError, match=r"no adapter 'vi' on this model: loaded are 'default'"):
        cg.merge_lora(model, "vi")
    with pytest.raises(cg.errors.AdapterError, match="nothing to merge"):
        cg.merge_lora(model, [])
    cg.merge_lora(model)
    for attempt in (
        lambda: cg.merge_lora(model),
        lambda: cg.apply_lora(model, name="other"),
        lambda: cg.load_adapter(model, folder),
        lambda: cg.set_adapter(model, None),
        lambda: cg.disable_lora(model),
        lambda: cg.lora.verify_gradients(model),
        lambda: cg.combine_adapters(model, {"default": 1.0}, "sum"),
    ):
        with pytest.raises(
            cg.errors.AdapterError, match=r"while 'default' is merged .* call unmerge_lora first"
        ):
            attempt()
    assert not any(p.requires_grad for p in model.parameters())


@layouts
def test_a_merge_for_good(model: nn.Module) -> None:
    """A model to be shipped keeps adapter modules, or loses the merge when they go."""
    base = copy.deepcopy(model)
    cg.apply_lora(model, targets="all", train_logit_scale=True)
    randomise_active(model)
    wanted, scale = run(model), as_clip(model).logit_scale.item()
    with pytest.raises(cg.errors.AdapterError, match="call merge_lora first"):
        cg.remove_lora(model, keep_merged=True)
    cg.merge_lora(model)
    cg.remove_lora(model, keep_merged=True)
    assert list(model.state_dict()) == list(base.state_dict())
    assert largest(run(model), wanted) <= bound(wanted)
    assert as_clip(model).logit_scale.item() == scale
    assert as_clip(model).fingerprint != as_clip(base).fingerprint
