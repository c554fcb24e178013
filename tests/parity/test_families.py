"""An adapter moves between open_clip and transformers with the same base weights: the logits are the same."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clipgraft as cg
from clipgraft.models.clip import as_clip
from explicit_lora import ROLES, randomise_active, target
from peft_models import outputs, to_openclip

OPTIONS: dict[str, dict[str, Any]] = {
    **{role: {"targets": target(role)} for role in ROLES},
    **{f"DoRA {role}": {"targets": target(role), "use_dora": True} for role in ROLES},
    "all": {"targets": "all", "use_rslora": True},
    "patterns": {"targets": "all", "rank_pattern": {"text.*": 1}, "alpha_pattern": {"vision.*": 9.0}},
    "all, DoRA and biases": {"targets": "all", "use_dora": True, "bias": "all"},
    "biases of the adapted": {"targets": "attention", "bias": "lora_only"},
    "PiSSA": {"targets": "all", "init": "pissa"},
    "temperature": {"targets": "attention", "train_logit_scale": True},
}


def logits(model: nn.Module) -> Tensor:
    """(3, 3) logits of images and texts, the temperature included."""
    image, text = (torch.nn.functional.normalize(t, dim=-1) for t in outputs(model))
    return as_clip(model).logit_scale.detach().exp() * image @ text.T


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("made_on", ["open_clip", "transformers"])
def test_an_adapter_works_in_the_other_family(
    made_on: str, options: str, tiny_hf: nn.Module, tmp_path: Path
) -> None:
    """An adapter trained with one library is useless, or another one, in the other."""
    bases = {"open_clip": to_openclip(tiny_hf), "transformers": copy.deepcopy(tiny_hf)}
    model, other = bases.pop(made_on), next(iter(bases.values()))
    plain = logits(other)
    cg.apply_lora(model, r=3, alpha=2, **OPTIONS[options])
    randomise_active(model, seed=3)
    cg.load_adapter(other, cg.save_adapter(model, tmp_path))
    wanted = logits(model)
    assert (logits(other) - wanted).abs().max() <= 1e-5 * max(1.0, wanted.abs().max().item())
    assert (logits(other) - plain).abs().max() > 1e-4
