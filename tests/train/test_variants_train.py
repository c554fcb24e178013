"""Training every kind of adapter through `fit`, and what is saved of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import clipgraft as cg
from clipgraft.lora.state import require_lora
from clipgraft.train.args import TrainArgs
from clipgraft.train.setup import make_optimizer, set_lr
from fitting import groups

VARIANTS: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True},
    "biases": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
    "PiSSA": {"init": "pissa"},
    "VeRA": {"variant": "vera"},
    "EVA": {"init": "eva"},
    "temperature": {"train_logit_scale": True},
    "ranks by site": {"rank_pattern": {"text.0.*": 1}, "use_rslora": True},
}


@pytest.mark.parametrize("targets", ["text-attention", "vision.1.*,text.*.fc1,projection"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_with(variant: str, targets: str, make_clip: Any, pairs: cg.Pairs, tmp_path: Path) -> None:
    """A run with this option fails, trains nothing, or saves an adapter that computes something else."""
    clip = make_clip()
    cg.apply_lora(clip, r=2, targets=targets, **VARIANTS[variant])
    before = {name: tensor.clone() for name, tensor in cg.adapters.lora_state_dict(clip).items()}
    result = cg.fit(
        clip,
        pairs,
        **groups(
            out=tmp_path / "run",
            epochs=2,
            batch_size=6,
            lr=1e-2,
            workers=0,
            progress=False,
            lora_plus_ratio=4.0,
        ),
    )
    after = cg.adapters.lora_state_dict(clip)
    moved = [name for name, tensor in after.items() if not torch.equal(tensor, before[name])]
    frozen = [name for name in after if "start" in name]
    assert sorted(moved) == sorted(set(after) - set(frozen))
    other = make_clip()
    cg.load_adapter(other, result.saved)
    captions = [caption for _, caption in pairs.rows()][:4]
    with torch.no_grad():
        wanted, got = clip.encode_text(captions), other.encode_text(captions)
    assert torch.allclose(got, wanted, atol=1e-5 * max(1.0, wanted.abs().max().item()))
    assert other.logit_scale.item() == pytest.approx(clip.logit_scale.item(), abs=1e-6)


def test_lora_plus_trains_the_zero_factors_faster(make_clip: Any) -> None:
    """`--lora-plus-ratio` changes no learning rate, or that of the wrong factors."""
    clip = make_clip()
    cg.apply_lora(clip, r=2, targets="all", use_dora=True, train_logit_scale=True)
    optimizer = make_optimizer(clip.model, TrainArgs(lr=1e-3, wd=0.1, lora_plus_ratio=16.0))
    set_lr(optimizer, 5e-4)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for site, layer in require_lora(clip).layers.items():
        b_first = site.role in ("token_embedding", "position_embedding")
        zero, other = (layer.lora_A, layer.lora_B) if b_first else (layer.lora_B, layer.lora_A)
        assert (rates[id(zero)], rates[id(other)]) == (16 * 5e-4, 5e-4), site
        assert rates[id(layer.lora_magnitude)] == 5e-4
    assert rates[id(clip.logit_scale)] == 5e-4


def test_lora_plus_trains_vectors_that_start_at_zero_faster(make_clip: Any) -> None:
    """`lora_plus_ratio` does nothing for VeRA."""
    clip = make_clip()
    cg.apply_lora(clip, r=2, variant="vera")
    optimizer = make_optimizer(clip.model, TrainArgs(lr=1e-3, wd=0.1, lora_plus_ratio=16.0))
    set_lr(optimizer, 5e-4)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for layer in require_lora(clip).layers.values():
        assert (rates[id(layer.vera_lambda_b)], rates[id(layer.vera_lambda_d)]) == (16 * 5e-4, 5e-4)


def test_a_merged_model_does_not_train(make_clip: Any, pairs: cg.Pairs, tmp_path: Path) -> None:
    """A run on merged weights trains an update that is in the base already."""
    clip = make_clip()
    cg.apply_lora(clip)
    cg.merge_lora(clip)
    with pytest.raises(cg.errors.AdapterError, match=r"cannot train while 'default' is merged"):
        cg.fit(clip, pairs, **groups(out=tmp_path / "run", epochs=1, batch_size=6))
    assert not (tmp_path / "run").exists()
