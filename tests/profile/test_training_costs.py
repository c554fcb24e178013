"""What a training step costs, against a real one, and what an adapter weighs, against published numbers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clipgraft as cg
from clipgraft.lora.state import require_lora
from clipgraft.models.clip import as_clip
from clipgraft.models.meta import clip_on_meta
from clipgraft.models.sites import TOWERS
from clipgraft.profile.trace import on_meta
from clipgraft.profile.training import FULL, distinct_sets, target_costs, training_costs
from flop_counting import flop_counter

SETS = ("text-attention", "vision.-1.fc1", "linear", "all", "projection")


def real_step(model: nn.Module, targets: str, length: int) -> dict[str, Any]:
    """A step of AdamW on three pairs: what torch counts, per tower, and the bytes that it really holds."""
    clip = as_clip(copy.deepcopy(model).eval())
    clip.model.requires_grad_(True)
    if targets != FULL:
        cg.apply_lora(clip, r=4, targets=targets)
    inputs = (torch.randint(1, 90, (3, length)), torch.randn(3, 3, 32, 32))
    calls = (clip.family.encode_text, clip.family.encode_image)
    found: dict[str, Any] = {}
    features: list[Tensor] = []
    for tower, run, given in zip(TOWERS, calls, inputs, strict=True):
        with flop_counter() as counter:
            features.append(run(clip.model, given))
            forward = counter.get_total_flops() // 2
            if features[-1].requires_grad:
                features[-1].sum().backward()  # type: ignore[no-untyped-call]
        backward = counter.get_total_flops() // 2 - forward
        found[tower] = (features[-1].requires_grad, forward, backward)
    if targets == FULL:
        clip.logit_scale.grad = torch.zeros_like(clip.logit_scale)
    trained = [p for p in clip.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    found["trainable"] = sum(p.numel() for p in trained)
    found["gradients"] = sum(p.grad.nbytes for p in trained if p.grad is not None)
    found["moments"] = sum(moment.nbytes for moment in moments)
    found["weights"] = sum(p.nbytes for p in clip.model.parameters())
    return found


@pytest.mark.parametrize("family", ["tiny_openclip", "tiny_hf"])
def test_against_a_real_step(family: str, request: pytest.FixtureRequest) -> None:
    """The table of training costs promises other compute or memory than training then takes."""
    model = request.getfixturevalue(family)
    length = 9
    costs = training_costs(model, SETS, r=4, batch=3, text_tokens=length)
    assert [cost.targets for cost in costs] == [FULL, *SETS]
    for cost in costs:
        real = real_step(model, cost.targets, length)
        for tower in cost.towers:
            expected = real[tower.tower]
            assert (not tower.frozen, tower.forward_macs, tower.backward_macs) == expected, cost.targets
            assert (tower.saved_bytes > 0) == (not tower.frozen)
        assert cost.trainable == real["trainable"]
        assert cost.gradient_bytes == real["gradients"]
        assert cost.optimizer_bytes == real["moments"]
        assert cost.weight_bytes == real["weights"]
        held = real["weights"] + real["gradients"] + real["moments"]
        assert cost.memory_bytes == held + cost.saved_bytes


def test_the_documented_rule() -> None:
    """Backward passes that LoRA does not need are charged, or needed ones are not."""
    costs = {cost.targets: cost for cost in training_costs(clip_on_meta("emoji"), ("text.-1.fc2",))}
    full, last = costs[FULL], costs["text.-1.fc2"]
    clip = clip_on_meta("emoji")
    refs = {str(site): ref.shape for site, ref in clip.site_refs.items()}
    inner, outer = refs["text.0.fc2"][1], refs["text.0.fc2"][0]
    dim, length = refs["text.proj"][0], clip.context_length
    # Above the last fc2 there is the projection of one token: the gradient of its input alone.
    factors = length * 16 * (inner + outer)
    base = full.text.forward_macs
    assert last.text.forward_macs == base + factors
    # Of A, which reads what the frozen base gives, the gradient of the weight; of B both.
    assert last.text.backward_macs == dim * outer + length * 16 * inner + 2 * length * 16 * outer
    assert last.vision.frozen
    assert last.vision.backward_macs == 0
    assert last.cached_macs == last.text.forward_macs + last.text.backward_macs
    assert last.macs == last.cached_macs + full.vision.forward_macs
    # Full tuning: both gradients of every product but the first one's; attention 5 products for 2.
    patch = refs["vision.patch_embedding"]
    patches = refs["vision.position_embedding"][0] - 1
    first = patches * torch.Size(patch).numel()
    blocks = sum(site.endswith(".q") and site.startswith("vision.") for site in refs)
    attention = blocks * 2 * (patches + 1) ** 2 * patch[0]
    expected = 2 * (full.vision.forward_macs - attention) - first + attention * 5 // 2
    assert full.vision.backward_macs == expected


def test_a_model_that_carries_an_adapter(tiny_hf: nn.Module) -> None:
    """Costs of target sets include an adapter that the model happens to have, or take it off for good."""
    plain = training_costs(tiny_hf, ("mlp",), r=4)
    cg.apply_lora(tiny_hf, r=8, targets="attention")
    assert training_costs(tiny_hf, ("mlp",), r=4) == plain
    assert cg.count_parameters(tiny_hf).lora > 0
    cg.merge_lora(tiny_hf)
    assert training_costs(tiny_hf, ("mlp",), r=4) == plain
    cg.unmerge_lora(tiny_hf)
    assert target_costs(tiny_hf, ("mlp",), 4)[0].parameters == plain[1].trainable


def test_sizes_of_adapters() -> None:
    """`clipgraft inspect` gives another size for the guide's adapter than the file that training writes."""
    (cost,) = target_costs(clip_on_meta("ViT-B-32"), ("text-attention",))
    assert (cost.sites, cost.parameters, cost.megabytes) == (48, 786_432, 786_432 * 4 / 1e6)
    assert cost.share == pytest.approx(786_432 / 151_277_313)


def test_sets_are_listed_once(tiny_openclip: nn.Module) -> None:
    """The same sites appear under two names, or a set that fits nothing ends the listing."""
    names = distinct_sets(tiny_openclip)
    assert "linear" in names
    assert "all-linear" not in names
    chosen = [frozenset(cost_sites(tiny_openclip, name)) for name in names]
    assert len(set(chosen)) == len(names)
    only_text = as_clip(tiny_openclip)
    with pytest.raises(cg.errors.TargetError, match="near misses"):
        target_costs(only_text, ("text-atention",))


def cost_sites(model: nn.Module, targets: str) -> list[str]:
    from clipgraft.lora.targets import select_sites

    return [str(site) for site in select_sites(as_clip(model).sites, targets)]


def test_one_tower_without_sites() -> None:
    """A ResNet's image tower, which has no MLP, makes the listing of target sets fail."""
    clip = clip_on_meta(
        "RN50", {"vision_cfg.layers": [1, 1, 1, 1], "vision_cfg.width": 8, "text_cfg.layers": 1}
    )
    assert "vision-mlp" not in distinct_sets(clip)
    costs = training_costs(clip, ("text-attention",))
    assert costs[1].vision.frozen


def test_nothing_is_allocated_for_merged_models(tiny_openclip: nn.Module) -> None:
    """Looking at a model with merged adapters takes the memory of its base once more."""
    cg.apply_lora(tiny_openclip, r=4, targets="all")
    cg.merge_lora(tiny_openclip)
    merged = require_lora(on_meta(tiny_openclip)).merged
    assert merged is not None
    assert merged.originals
    assert all(weight.is_meta for weight in merged.originals.values())
