"""What trains, and how: frozen towers, AdamW groups, the temperature's range."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import nn

from clipgraft.errors import ConfigError
from clipgraft.lora.layers import LoraLayer
from clipgraft.models.clip import Clip
from clipgraft.models.sites import Tower
from clipgraft.train.args import TrainArgs


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]],
    weight_decay: float,
    faster: Collection[nn.Parameter] = (),
    ratio: float = 1.0,
) -> list[dict[str, Any]]:
    """AdamW groups: matrices decay; biases, norms and scales (anything below two dimensions) do not.

    Parameters that are to learn `faster`, `ratio` times as fast as the others, are groups of their own.
    """
    fast = set(map(id, faster))
    trained = [parameter for _, parameter in named if parameter.requires_grad]

    def some(matrices: bool, boosted: bool) -> list[nn.Parameter]:
        return [p for p in trained if (p.ndim >= 2) == matrices and (id(p) in fast) == boosted]

    groups = [
        {"params": some(True, False), "weight_decay": weight_decay},
        {"params": some(True, True), "weight_decay": weight_decay, "lr_ratio": ratio},
        {"params": some(False, False), "weight_decay": 0.0},
        {"params": some(False, True), "weight_decay": 0.0, "lr_ratio": ratio},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, args: TrainArgs) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) over the trainable weights of a model.

    `lora_plus_ratio` is the λ of LoRA+ (Hayou et al. 2024, arXiv:2402.12354): the factor of each update that
    starts at zero, B for all but embeddings (b of VeRA), learns λ times as fast.
    """
    ratio = args.lora_plus_ratio
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)] if ratio != 1 else []
    faster = [layer.starts_at_zero for layer in layers]
    groups = parameter_groups(model.named_parameters(), args.wd, faster, ratio)
    return torch.optim.AdamW(groups, lr=args.lr, betas=(args.beta1, args.beta2), eps=args.eps, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the learning rate, or its own multiple of it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)


def clamp_logit_scale(logit_scale: nn.Parameter) -> None:
    """Keep the temperature in CLIP's range: the scale itself between 1 and 100."""
    if logit_scale.requires_grad:
        with torch.no_grad():
            logit_scale.clamp_(0, math.log(100))


_OPTION = {"vision": "lock_image_unlocked_groups", "text": "lock_text_unlocked_layers"}


def lock_tower(clip: Clip, tower: Tower, unlocked_groups: int = 0) -> None:
    """Freeze a tower but for its last `unlocked_groups` groups.

    Groups run from input to output: the embeddings, each block, the last block with the final norm, and the
    projection (Zhai et al. 2022, arXiv:2111.07991, as open_clip counts them).

    Raises:
        ConfigError: the tower is no transformer, and has no groups to leave unlocked.
    """
    groups = clip.family.tower_groups(clip.model, tower)
    if unlocked_groups and len(groups) == 1:
        raise ConfigError(f"`{_OPTION[tower]}`: this base's {tower} tower can only be locked whole; drop it")
    locked = max(0, len(groups) - unlocked_groups)
    for number, group in enumerate(groups):
        for parameter in group:
            parameter.requires_grad_(number >= locked)
