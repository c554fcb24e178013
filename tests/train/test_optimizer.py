"""AdamW groups and schedules against open_clip's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import open_clip_train.scheduler as reference
import pytest
import torch
from hypothesis import given, settings
from torch import nn

import clipgraft as cg
from clipgraft.train.args import TrainArgs
from clipgraft.train.schedule import make_schedule
from clipgraft.train.setup import clamp_logit_scale, make_optimizer, parameter_groups, set_lr


def decays_in_open_clip(name: str, parameter: nn.Parameter) -> bool:
    """The rule of open_clip_train/main.py."""
    plain = parameter.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))
    return not plain


@pytest.mark.parametrize("family", ["open_clip", "open_clip with LoRA", "transformers"])
def test_weight_decay_groups_follow_open_clip(
    family: str, tiny_openclip: nn.Module, tiny_hf: nn.Module
) -> None:
    """Decay on biases, norms or the temperature would pull a fine-tuned model off its base."""
    model = tiny_hf if family == "transformers" else tiny_openclip
    if "LoRA" in family:
        cg.apply_lora(model, r=2, targets="all", train_logit_scale=True)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = parameter_groups(model.named_parameters(), 0.2)
    found = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert found == {id(p): 0.2 if decays_in_open_clip(name, p) else 0.0 for name, p in named.items()}
    assert len(found) == sum(len(group["params"]) for group in groups) > 10


def test_frozen_weights_are_in_no_group(tiny_openclip: nn.Module) -> None:
    """A frozen base would still cost two fp32 moments a weight."""
    cg.apply_lora(tiny_openclip, r=2)
    optimizer = make_optimizer(tiny_openclip, TrainArgs(lr=1e-3, wd=0.1))
    held = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert held == cg.count_parameters(tiny_openclip).trainable


class _Recorder:
    """Stands for an optimizer: open_clip's schedules write into its groups."""

    def __init__(self) -> None:
        self.param_groups: list[dict[str, Any]] = [{}]


def open_clip_schedule(
    kind: str, lr: float, warmup: int, total: int, cooldown: int, power: float, end: float
) -> Any:
    recorder: Any = _Recorder()
    if kind == "cosine":
        return reference.cosine_lr(recorder, lr, warmup, total)
    if kind == "const":
        return reference.const_lr(recorder, lr, warmup, total)
    return reference.const_lr_cooldown(recorder, lr, warmup, total, cooldown, power, end)


@settings(deadline=None)
@given(
    kind=st.sampled_from(["cosine", "const", "const-cooldown"]),
    warmup=st.integers(0, 20),
    rest=st.integers(1, 40),
    cooldown=st.integers(1, 20),
    power=st.floats(0.5, 3),
    end=st.floats(0, 1e-4),
)
def test_schedules_are_open_clips(
    kind: str, warmup: int, rest: int, cooldown: int, power: float, end: float
) -> None:
    """A run with open_clip's flags would take other steps than open_clip."""
    total = warmup + rest
    cooldown = min(cooldown, total)
    ours = make_schedule(kind, 1e-3, warmup, total, cooldown, end, power)
    theirs: Callable[[int], float] = open_clip_schedule(kind, 1e-3, warmup, total, cooldown, power, end)
    assert [ours(step) for step in range(total)] == pytest.approx(
        [theirs(step) for step in range(total)], rel=1e-12
    )


def test_learning_rate_reaches_every_group(tiny_openclip: nn.Module) -> None:
    """Biases and norms would keep the first learning rate for ever."""
    optimizer = make_optimizer(tiny_openclip, TrainArgs(lr=1e-3, wd=0.1))
    set_lr(optimizer, 5e-6)
    assert [group["lr"] for group in optimizer.param_groups] == [5e-6, 5e-6]


@pytest.mark.parametrize(("given", "kept"), [(9.0, 4.6052), (-1.0, 0.0), (3.0, 3.0)])
def test_temperature_stays_in_clips_range(given: float, kept: float) -> None:
    """Above 100 the softmax saturates and training stalls."""
    scale = nn.Parameter(torch.tensor(given))
    clamp_logit_scale(scale)
    assert scale.item() == pytest.approx(kept, abs=1e-4)
