"""From a model and options to a run that can begin: its epochs, what of the model trains, its number type."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from clipgraft.data.args import FeatureArgs
from clipgraft.lora.state import lora_state
from clipgraft.models.clip import Clip
from clipgraft.models.device import use_autocast
from clipgraft.train.args import RunArgs, TrainArgs
from clipgraft.train.checkpoint import recorded_settings
from clipgraft.train.distributed import ALONE, World
from clipgraft.train.optimizer import lock_tower
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
        """Whether this process shows bars, if the output is a terminal."""
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


def set_up(clip: Clip, train: TrainArgs, run: RunArgs, features: FeatureArgs, world: World) -> Setup:
    """Decide on epochs and number type, which a resumed run has had before, and freeze what does not train.

    Raises:
        ConfigError: options that do not go together, or with this model.
        CheckpointError: fewer epochs than the run has done or was to have, or other parts than it has had.
    """
    train = plan_epochs(train, run, world)
    choose_trainable(clip, train)
    autocast = world.on_rank0(lambda: _choose_autocast(clip, run, features.autocast))
    return Setup(clip, train, run, features, autocast, world)


def choose_trainable(clip: Clip, args: TrainArgs) -> None:
    """The adapter trains if there is one; else everything but what the locks freeze."""
    if lora_state(clip) is None:
        clip.model.requires_grad_(True)
        if args.lock_image:
            lock_tower(clip, "vision", args.lock_image_unlocked_groups)
        if args.lock_text:
            lock_tower(clip, "text", args.lock_text_unlocked_layers)
    if clip.logit_scale.requires_grad:
        # A step moves the temperature by less than two neighbouring bf16 numbers are apart.
        clip.logit_scale.data = clip.logit_scale.data.float()
    if args.grad_checkpointing:
        clip.family.set_grad_checkpointing(clip.model, True)


def _choose_autocast(clip: Clip, run: RunArgs, choice: bool | None) -> bool:
    """As chosen; else as a resumed run did so far, whatever a measurement says today; else measured."""
    latest = latest_checkpoint(run.out)
    if choice is None and run.resume and latest.exists():
        recorded = recorded_settings(latest).get("autocast")
        if isinstance(recorded, bool):
            log.info("computing in %s, as this run did before", "bf16" if recorded else "fp32")
            return recorded
    return use_autocast(choice, clip.device)
