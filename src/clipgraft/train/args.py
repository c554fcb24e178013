"""Options of training: how a model is optimised, what its run keeps, and those of single recipes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from clipgraft.options import (
    AutoCount,
    AutoRate,
    Beta,
    ClipNorm,
    Count,
    Decay,
    Epsilon,
    Frequency,
    Layers,
    LossWeight,
    Options,
    Power,
    PythonOnly,
    Rate,
    Ratio,
    UserPath,
    Views,
    words,
)

PATIENCE = 5
"""Epochs without a better one, after which a run that is not told how many to make makes no more."""
_STEPS, _FEWEST_EPOCHS, _MOST_EPOCHS = 1000, 3, 15  # of a run that is not told
LossKind = Literal["softmax", "sigmoid"]
TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]


def _trackers(value: Any) -> Any:
    """`wandb,mlflow` -> ("wandb", "mlflow"); `none` -> ()."""
    found = words(value)
    return () if found == ("none",) else found


class TrainArgs(Options):
    """Optimisation; names are open_clip's, defaults are for tuning a pretrained model."""

    batch_size: Count = Field(64, ge=2, description="pairs (or images) per process and micro-batch")
    epochs: AutoCount = Field(
        "auto",
        description="passes over the captions; auto: by the number of pairs; a larger number extends a "
        "resumed run",
    )
    epoch_parts: Annotated[tuple[Annotated[Count, Field(ge=1)], ...] | None, BeforeValidator(words)] = Field(
        None,
        min_length=1,
        description="epochs of each part of a run, such as 10,10; every part has its own "
        "learning-rate schedule, as if a run of 10 epochs were resumed with `epochs=20` "
        "(default: one part)",
    )
    steps: Count | None = Field(
        None,
        ge=1,
        description="train for so many steps in place of epochs: one epoch, over the data as often as needed",
    )
    lr: AutoRate = Field(
        "auto",
        description="peak learning rate; auto tries several on a part of the training data, for at most 15 % "
        "of the run's steps",
    )
    wd: Decay = Field(0.1, ge=0, description="weight decay of matrices; biases, norms and scales have none")
    beta1: Beta = Field(0.9, ge=0, lt=1, description="AdamW beta 1")
    beta2: Beta = Field(0.98, ge=0, lt=1, description="AdamW beta 2")
    eps: Epsilon = Field(1e-6, gt=0, description="AdamW epsilon")
    warmup: Count = Field(500, ge=0, description="steps of linear warmup, at most a tenth of the run")
    lr_scheduler: Literal["cosine", "const", "const-cooldown"] = Field(
        "cosine", description="schedule after warmup"
    )
    lr_end: Rate = Field(0.0, ge=0, description="learning rate at the end of the cosine")
    epochs_cooldown: Count | None = Field(
        None, ge=1, description="epochs of cooldown at the end, with const-cooldown"
    )
    lr_cooldown_end: Rate = Field(0.0, ge=0, description="learning rate at the end of the cooldown")
    lr_cooldown_power: Power = Field(1.0, gt=0, description="exponent of the cooldown; 1 is linear")
    lora_plus_ratio: Ratio = Field(
        1.0, ge=1, description="LoRA+: learning rate of the factors that start at zero, as a multiple of `lr`"
    )
    grad_clip_norm: ClipNorm | None = Field(None, gt=0, description="clip the gradient to this norm")
    accum_freq: Count = Field(
        1, ge=1, description="micro-batches of `batch_size` per step; the loss is contrasted over all of them"
    )
    grad_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass instead of storing them"
    )
    lock_image: bool = Field(False, description="freeze the image tower")
    lock_image_unlocked_groups: Layers = Field(
        0, ge=0, description="with `lock_image`: number of last groups that stay trainable"
    )
    lock_text: bool = Field(False, description="freeze the text tower")
    lock_text_unlocked_layers: Layers = Field(
        0, ge=0, description="with `lock_text`: number of last layers that stay trainable"
    )
    norms_only: bool = Field(
        False, description="without an adapter, train the layer norms alone; `wd` is theirs then"
    )
    negatives: Literal["batch", "gallery"] | None = Field(
        None,
        description="contrast with the batch, or with all features of a frozen tower (default: "
        "gallery if a tower is frozen)",
    )
    loss: Literal["auto", "softmax", "sigmoid"] = Field(
        "auto",
        description="loss of pairs: each told from all others (softmax, as CLIP), or each pair judged by "
        "itself (sigmoid, as SigLIP); auto: sigmoid if the base has a `logit_bias`, else softmax",
    )
    augment: bool = Field(False, description="train on random crops of the images")
    cache_views: Views | None = Field(
        None,
        ge=1,
        description="with `augment` and a frozen image tower: number of crops of each image, encoded once",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="seed of weights, order, dropout and crops")

    @property
    def peak_lr(self) -> float:
        """The learning rate once it is known: `auto` is replaced before the first step."""
        assert self.lr != "auto"
        return self.lr

    @property
    def planned_epochs(self) -> int:
        """The number of epochs once it is known: `auto` is replaced when the run is set up."""
        assert self.epochs != "auto"
        return self.epochs

    @property
    def parts(self) -> tuple[int, ...]:
        """Epochs of each part of the run, in order; they are known."""
        return self.epoch_parts or (self.planned_epochs,)

    def for_pairs(self, rows: int, processes: int = 1) -> TrainArgs:
        """The same with epochs for that many pairs, where they are left open."""
        if self.epochs != "auto" or self.epoch_parts is not None:
            return self
        if self.steps is not None:
            return self.replace(epochs=1)
        steps = rows // (self.batch_size * self.accum_freq * processes)
        wanted = -(-_STEPS // max(1, steps))
        return self.replace(epochs=min(max(wanted, _FEWEST_EPOCHS), _MOST_EPOCHS))

    def epoch_faults(self) -> list[str]:
        """What is wrong between `epochs` and `epoch_parts`, and with a cooldown that does not fit a part."""
        if self.epochs == "auto" and self.epoch_parts is None:
            return []
        parts, faults = self.parts, []
        if self.steps is not None and parts != (1,):
            given = "epochs" if self.epoch_parts is None else "epoch_parts"
            faults.append(f"`steps={self.steps}` is a run of one epoch: drop `{given}`, or `steps`")
        if self.epoch_parts is not None and "epochs" in self.model_fields_set and sum(parts) != self.epochs:
            given = ",".join(map(str, parts))
            told = f"`epoch_parts={given}` sum to {sum(parts)}, but `epochs` is {self.epochs}: drop one"
            faults.append(told)
        if self.lr_scheduler == "const-cooldown" and not 0 < (self.epochs_cooldown or 0) <= min(parts):
            faults.append(f"`lr_scheduler=const-cooldown` needs `epochs_cooldown` from 1 to {min(parts)}")
        return faults


class RunArgs(Options):
    """Where a run is kept, and what it keeps."""

    out: Annotated[UserPath, PythonOnly()] = Field(description="folder of the run")
    resume: Annotated[bool, PythonOnly()] = Field(
        False, description="go on with the run in that folder if it has a checkpoint, to the same bits"
    )
    save_frequency: Frequency = Field(1, ge=0, description="save every N epochs; 0 saves only the last")
    val_frequency: Frequency = Field(1, ge=0, description="evaluate every N epochs; 0 only after the last")
    patience: AutoCount | None = Field(
        "auto",
        description="stop when the best epoch on the validation data was this many epochs ago, and keep "
        f"that; auto: {PATIENCE} where `epochs` is auto too, else never",
    )
    strength: Literal["sweep", "auto", "none"] = Field(
        "sweep",
        description="after training, measure what is gained and kept from 0 to 1.5 times the strength of "
        "what was learnt; auto: save the recommended one as the adapter's alpha; none: do not measure",
    )
    save_lora_only: bool = Field(
        True,
        description="save only adapters; `save_lora_only=False` also saves the whole model as epoch_N.pt",
    )
    checkpoint_steps: Frequency = Field(
        0, ge=0, description="also checkpoint every N steps; 0: once per epoch"
    )
    track: Annotated[tuple[TrackerName, ...], BeforeValidator(_trackers)] = Field(
        ("tensorboard",),
        description="where every loss and metric is sent, besides events.jsonl: tensorboard, wandb, mlflow, "
        "trackio, joined by commas; or none",
    )
    track_project: str = Field(
        "clipgraft", min_length=1, description="project at wandb and trackio, experiment at mlflow"
    )
    progress: Annotated[bool | None, PythonOnly()] = Field(
        None, description="bars: None and True where the output is a terminal"
    )
    params: Annotated[dict[str, Any], PythonOnly()] = Field(
        {}, description="what else params.json and params.txt are to record"
    )

    def for_epochs(self, asked: TrainArgs, validated: bool) -> RunArgs:
        """The same with the patience that `auto` comes to, for what was asked of the run's epochs."""
        if self.patience != "auto":
            return self
        open_ended = asked.epochs == "auto" and asked.epoch_parts is None
        return self.replace(patience=PATIENCE if open_ended and validated else None)

    @property
    def waits(self) -> int | None:
        """The patience once it is known: `auto` is replaced when the run is set up."""
        assert self.patience != "auto"
        return self.patience

    @property
    def kept(self) -> dict[str, Any]:
        """The options for the run's record."""
        return self.model_dump(exclude={"out", "resume", "progress", "params"})


class HeadArgs(Options):
    """What tells classes apart."""

    head: Literal["prompts", "linear", "cosine"] = Field(
        "prompts",
        description="what predicts classes: their prompts, or a trained linear or cosine head "
        "initialized from them",
    )
    weights: Annotated[tuple[float, ...] | None, PythonOnly()] = Field(
        None, description="of each class in the loss (default: 1 each)"
    )


class TranslateArgs(Options):
    """How translations count beside pairs: by default as `retain` does where nothing can be tried."""

    translation_weight: LossWeight = Field(
        30.0,
        ge=0,
        description="weight of a translation's distance to the base's features of its source, beside the "
        "loss of pairs",
    )


class DistillArgs(Options):
    """How much each term of the loss of a distillation counts."""

    contrastive: LossWeight = Field(0.1, ge=0, description="weight of the contrastive loss")
    feature: LossWeight = Field(10.0, ge=0, description="weight of the distance to the base's features")
    similarity: LossWeight = Field(1.0, ge=0, description="weight of the distance to the base's similarities")
