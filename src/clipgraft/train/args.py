"""Options of training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from clipgraft.options import (
    Beta,
    ClipNorm,
    Count,
    Decay,
    Epsilon,
    Layers,
    Options,
    PeakRate,
    Power,
    Rate,
    Ratio,
    Views,
    words,
)


class TrainArgs(Options):
    """Optimisation; names and defaults are open_clip's."""

    batch_size: Count = Field(64, ge=2, description="pairs (or images) per process and micro-batch")
    epochs: Count = Field(
        32, ge=1, description="passes over the captions; a larger number extends a resumed run"
    )
    epoch_parts: Annotated[tuple[Annotated[Count, Field(ge=1)], ...] | None, BeforeValidator(words)] = Field(
        None,
        min_length=1,
        description="epochs of each part of a run, such as 10,10; every part has its own "
        "learning-rate schedule, as if a run of 10 epochs were resumed with --epochs 20 "
        "(default: one part)",
    )
    lr: PeakRate = Field(5e-4, gt=0, description="peak learning rate")
    wd: Decay = Field(0.2, ge=0, description="weight decay of matrices; biases, norms and scales have none")
    beta1: Beta = Field(0.9, ge=0, lt=1, description="AdamW beta 1")
    beta2: Beta = Field(0.98, ge=0, lt=1, description="AdamW beta 2")
    eps: Epsilon = Field(1e-6, gt=0, description="AdamW epsilon")
    warmup: Count = Field(10000, ge=0, description="steps of linear warmup, at most a tenth of the run")
    lr_scheduler: Literal["cosine", "const", "const-cooldown"] = Field(
        "cosine", description="schedule after warmup"
    )
    epochs_cooldown: Count | None = Field(
        None, ge=1, description="epochs of cooldown at the end, with const-cooldown"
    )
    lr_cooldown_end: Rate = Field(0.0, ge=0, description="learning rate at the end of the cooldown")
    lr_cooldown_power: Power = Field(1.0, gt=0, description="exponent of the cooldown; 1 is linear")
    lora_plus_ratio: Ratio = Field(
        1.0, ge=1, description="LoRA+: learning rate of the factors that start at zero, as a multiple of --lr"
    )
    grad_clip_norm: ClipNorm | None = Field(None, gt=0, description="clip the gradient to this norm")
    accum_freq: Count = Field(
        1, ge=1, description="micro-batches of --batch-size per step; the loss is contrasted over all of them"
    )
    grad_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass instead of storing them"
    )
    lock_image: bool = Field(False, description="freeze the image tower")
    lock_image_unlocked_groups: Layers = Field(
        0, ge=0, description="with --lock-image: number of last groups that stay trainable"
    )
    lock_text: bool = Field(False, description="freeze the text tower")
    lock_text_unlocked_layers: Layers = Field(
        0, ge=0, description="with --lock-text: number of last layers that stay trainable"
    )
    negatives: Literal["batch", "gallery"] | None = Field(
        None,
        description="contrast with the batch, or with all features of a frozen tower (default: "
        "gallery if a tower is frozen)",
    )
    augment: bool = Field(False, description="train on random crops of the images")
    cache_views: Views | None = Field(
        None,
        ge=1,
        description="with --augment and a frozen image tower: number of crops of each image, encoded once",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="seed of weights, order, dropout and crops")

    def epoch_faults(self) -> list[str]:
        """What is wrong between `epochs` and `epoch_parts`, and with a cooldown that does not fit a part."""
        parts, faults = self.epoch_parts or (self.epochs,), []
        if self.epoch_parts is not None and "epochs" in self.model_fields_set and sum(parts) != self.epochs:
            given = ",".join(map(str, parts))
            faults.append(
                f"--epoch-parts {given} sum to {sum(parts)}, but --epochs is {self.epochs}: drop one"
            )
        if self.lr_scheduler == "const-cooldown" and not 0 < (self.epochs_cooldown or 0) <= min(parts):
            faults.append(f"--lr-scheduler const-cooldown needs --epochs-cooldown from 1 to {min(parts)}")
        return faults
