"""From a model and options to a run that can begin: its epochs, what trains, its number type, AdamW."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from clipgraft.data.args import FeatureArgs
from clipgraft.errors import ConfigError
from clipgraft.lora.layers import LoraLayer
from clipgraft.lora.state import lora_state
from clipgraft.models.clip import Clip
from clipgraft.models.device import use_autocast
from clipgraft.models.sites import Tower
from clipgraft.train.args import RunArgs, TrainArgs
from clipgraft.train.checkpoint import recorded_settings
from clipgraft.train.distributed import ALONE, World
from clipgraft.train.run_folder import latest_checkpoint
from clipgraft.train.schedule import plan_epochs

log = logging.getLogger("clipgraft")


@dataclass(frozen=True)
class Setup:
    """A model, the options of its training, and the processes that train it together.

    Attributes:
        autocast: whether features are computed in bf16 where that is safe: what `features.autocast` came to.
    """

    clip: Clip
    train: TrainArgs
    run: RunArgs
    features: FeatureArgs
    autocast: bool = False
    world: World = ALONE

    @property
    def shows(self) -> bool:
        """Whether this process shows bars, if the output is a terminal or a notebook."""
        return self.run.progress is not False and self.world.is_rank0

    def settings(self) -> dict[str, Any]:
        """What no kind of run may change before it is resumed, its data aside."""
        state = lora_state(self.clip)
        return {
            **self.train.model_dump(),
            "autocast": self.autocast,
            "exact_preprocess": self.features.exact_preprocess,
            "base": self.clip.fingerprint,
            "lora": state.chosen().settings.record() if state is not None else None,
            **({} if self.world.alone else {"processes": self.world.world_size}),
        }


def set_up(
    clip: Clip, train: TrainArgs, run: RunArgs, features: FeatureArgs, world: World, rows: int
) -> Setup:
    """Decide on epochs and number type, which a resumed run has had before, and freeze what does not train.

    Raises:
        ConfigError: options that do not go together, or with this model.
        CheckpointError: fewer epochs than the run has done or was to have, or other parts than it has had.
    """
    train = plan_epochs(train, run, rows, world)
    choose_trainable(clip, train)
    autocast = world.on_rank0(lambda: _choose_autocast(clip, run, features.autocast))
    return Setup(clip, train, run, features, autocast, world)


def choose_trainable(clip: Clip, args: TrainArgs) -> None:
    """The adapter trains if there is one; else everything but what the locks freeze."""
    if lora_state(clip) is not None:
        if args.norms_only:
            raise ConfigError(
                "`norms_only` trains weights of the base, and the model has an adapter: drop one"
            )
    else:
        clip.model.requires_grad_(True)
        if clip.logit_bias is not None:
            clip.logit_bias.requires_grad_(args.loss == "sigmoid")  # a softmax does not depend on it
        if args.lock_image:
            lock_tower(clip, "vision", args.lock_image_unlocked_groups)
        if args.lock_text:
            lock_tower(clip, "text", args.lock_text_unlocked_layers)
        if args.norms_only:
            _freeze_all_but_norms(clip)
    for parameter in clip.temperature.values():
        if parameter.requires_grad:
            # A step moves the temperature by less than two neighbouring bf16 numbers are apart.
            parameter.data = parameter.data.float()
    if args.grad_checkpointing:
        clip.family.set_grad_checkpointing(clip.model, True)


def _freeze_all_but_norms(clip: Clip) -> None:
    norms = clip.family.norms(clip.model).values()
    kept = {id(parameter) for norm in norms for parameter in norm.parameters()}
    for parameter in clip.model.parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in kept)


def _choose_autocast(clip: Clip, run: RunArgs, choice: bool | None) -> bool:
    """As chosen; else as a resumed run did so far, whatever a measurement says today; else measured."""
    latest = latest_checkpoint(run.out)
    if choice is None and run.resume and latest.exists():
        recorded = recorded_settings(latest).get("autocast")
        if isinstance(recorded, bool):
            log.info("computing in %s, as this run did before", "bf16" if recorded else "fp32")
            return recorded
    return use_autocast(choice, clip.device)


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
    if args.norms_only:
        norms = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [{"params": norms, "weight_decay": args.wd}]
    else:
        groups = parameter_groups(model.named_parameters(), args.wd, faster, ratio)
    return torch.optim.AdamW(
        groups, lr=args.peak_lr, betas=(args.beta1, args.beta2), eps=args.eps, fused=True
    )


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
