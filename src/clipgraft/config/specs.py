"""Flags of training and evaluation, declared once; those of the other commands are in `tools`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from clipgraft.options import (
    Alpha,
    AlphaPattern,
    Batch,
    Beta,
    ClipNorm,
    Count,
    Decay,
    Dropout,
    Epsilon,
    Frequency,
    Gigabytes,
    Layers,
    Options,
    PeakRate,
    Power,
    Precision,
    Rank,
    RankPattern,
    Rate,
    Ratio,
    Seeds,
    UserPath,
    Views,
    Words,
    Workers,
    expressions,
    separator,
    words,
)


class OverwriteSpec(Options):
    """What may be replaced."""

    overwrite: bool = Field(
        False, description="replace what is there, even if clipgraft did not make it; without it that is left"
    )


class DeviceSpec(Options):
    """Where a model runs, and in what precision."""

    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    precision: Precision = Field(
        "auto",
        description="amp_bf16 computes in bf16 where it is safe, auto does if that is faster here; bf16 also "
        "stores the base so",
    )

    @property
    def autocast(self) -> bool | None:
        """Whether to compute in bf16 on a base that is stored in fp32; None leaves it to a measurement."""
        return None if self.precision == "auto" else self.precision == "amp_bf16"


class ModelSpec(DeviceSpec):
    """Which base, and where it runs."""

    model: str = Field(
        "emoji", description="emoji, an open_clip name or JSON config, hf:ID, or a local folder"
    )
    pretrained: str | None = Field(
        None, description="open_clip tag, local checkpoint, or 'none' for random weights"
    )


class ColumnSpec(Options):
    """Where a table of images and captions has what."""

    csv_img_key: str | None = Field(None, description="column of image paths (default: filepath, or guessed)")
    csv_caption_key: str | None = Field(
        None, description="column of captions, or several by commas (default: title, or guessed)"
    )
    csv_separator: Annotated[str | None, BeforeValidator(separator)] = Field(
        None, min_length=1, description="column separator (default: tab, or guessed)"
    )
    csv_encoding: str | None = Field(
        None, min_length=1, description="encoding of the table, such as cp1252 (default: UTF-8, or UTF-16)"
    )
    csv_quoting: Literal["auto", "minimal", "none"] = Field(
        "auto", description="none leaves double quotes as they are (default: found out)"
    )
    image_root: UserPath | None = Field(
        None, description="folder that paths of images are relative to (default: that of the table)"
    )

    @property
    def reading(self) -> dict[str, Any]:
        """How a table of images is read, as every reader takes it; its other column is the reader's own."""
        return {
            "image_key": self.csv_img_key,
            "separator": self.csv_separator,
            "encoding": self.csv_encoding,
            "quoting": self.csv_quoting,
            "image_root": self.image_root,
        }


class CacheSpec(Options):
    """How images are decoded, and where features of frozen towers are kept."""

    workers: Workers = Field(2, ge=0, description="processes or threads that decode images")
    feature_cache: UserPath | None = Field(
        None,
        description="folder where features of a frozen image tower are kept for later runs, or 'none' "
        "(default: features in $CLIPGRAFT_CACHE or ~/.cache/clipgraft)",
    )
    cache_gb: Gigabytes = Field(20.0, gt=0, description="most that folder may grow to; the last used stay")


class TableSpec(ColumnSpec, CacheSpec):
    """How tables of images and captions are read."""

    dataset_type: Literal["auto", "csv", "tsv", "jsonl", "parquet", "folder"] = Field(
        "auto", description="how to read the data; auto goes by the file name"
    )
    max_bad_rows: int = Field(100, ge=0, description="stop when more rows than this are unreadable")
    strict: bool = Field(False, description="stop at the first unreadable row")
    keep_nulls: bool = Field(False, description="take captions like nan, None and N/A for captions")
    exact_preprocess: bool = Field(
        False, description="preprocess images with the base's own transform, to the last grey level"
    )


class DataSpec(TableSpec):
    """Images and captions."""

    train_data: UserPath | None = Field(None, description="table of images and captions, or a folder of both")
    val_data: UserPath | None = Field(None, description="the same for validation")
    val_csv_img_key: str | None = Field(None, description="as --csv-img-key, where --val-data has another")
    val_csv_caption_key: str | None = Field(None, description="the same for --csv-caption-key")
    val_csv_separator: Annotated[str | None, BeforeValidator(separator)] = Field(
        None, min_length=1, description="the same for --csv-separator"
    )
    val_csv_encoding: str | None = Field(None, min_length=1, description="the same for --csv-encoding")
    val_csv_quoting: Literal["auto", "minimal", "none"] | None = Field(
        None, description="the same for --csv-quoting"
    )
    val_image_root: UserPath | None = Field(None, description="the same for --image-root")

    def for_validation(self) -> DataSpec:
        """The same, with the columns of the validation data in place of the training data's."""
        given = {name: getattr(self, name) for name in type(self).model_fields if name.startswith("val_")}
        other = {name.removeprefix("val_"): value for name, value in given.items() if value is not None}
        return self.model_copy(update={name: other[name] for name in other if name != "data"})


class PromptSpec(Options):
    """What the classes are, and what is said for them."""

    csv_label_key: str | None = Field(None, description="column of class names (default: label, or guessed)")
    prompts: UserPath | None = Field(None, description="YAML of class: prompt, or class: [prompts]")
    templates: str = Field(
        "photo", description="for classes without prompts: photo, ensemble, or a text with {} in it"
    )


class ClassSpec(PromptSpec):
    """Telling classes apart."""

    val_csv_label_key: str | None = Field(None, description="the same for --val-data, if it has another")
    task: Literal["retrieval", "classification"] = Field(
        "retrieval", description="match images with their captions, or tell classes apart"
    )

    def for_validation(self) -> ClassSpec:
        """The same, with the label column of the validation data."""
        key = self.val_csv_label_key or self.csv_label_key
        return self.model_copy(update={"csv_label_key": key})


class ClassTrainSpec(ClassSpec):
    """Training to tell classes apart."""

    val_size: float | None = Field(None, gt=0, lt=1, description="share of each class to hold out")
    shots: Count | None = Field(None, ge=1, description="train on this many images of each class")
    head: Literal["prompts", "linear", "cosine"] = Field(
        "prompts", description="what tells classes apart: their prompts, or a classifier that starts there"
    )
    class_weights: bool = Field(False, description="weigh classes in the loss by how rare they are")


class AdapterSpec(Options):
    """The adapter, whatever its size."""

    lora_alpha: Alpha | None = Field(None, gt=0, description="the update is scaled by alpha/r (default: r)")
    lora_dropout: Dropout = Field(0.1, ge=0, lt=1, description="dropout on the adapter path")
    lora_rslora: bool = Field(False, description="scale by alpha/sqrt(r)")
    lora_dora: bool = Field(False, description="DoRA: train a magnitude of each output beside the direction")
    lora_bias: Literal["none", "lora_only", "all"] = Field(
        "none", description="biases to train too: of the adapted sites, or all"
    )
    lora_init: Literal["default", "pissa", "eva"] = Field(
        "default", description="start on random directions, on the base's principal ones, or on the data's"
    )
    lora_rank_pattern: RankPattern = Field(
        {}, description="other ranks for some sites: text.0.*=4,text.11.*=32"
    )
    lora_alpha_pattern: AlphaPattern = Field({}, description="other alphas for some sites")
    lora_train_logit_scale: bool = Field(False, description="train the temperature with the adapter")


class LoraSpec(AdapterSpec):
    """The adapter."""

    use_lora: bool = Field(
        False, description="train a LoRA adapter; without it the model itself is fine-tuned"
    )
    lora_r: Rank = Field(16, description="rank, or 'auto' to choose one by the number of training pairs")
    lora_targets: str | None = Field(
        None, description="target set or sites, e.g. text-attention or text.*.q,v"
    )
    lora_target_modules: Words | None = Field(
        None, description="the guide's names for text sites: in_proj,out_proj,c_fc,c_proj"
    )


class SweepSpec(AdapterSpec):
    """The grid, and the adapters in it."""

    targets: Annotated[tuple[str, ...], BeforeValidator(expressions)] = Field(
        ("text-attention",),
        min_length=1,
        description="target sets to compare, separated by semicolons; commas join the terms of one set",
    )
    lora_r: Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(words)] = Field(
        (16,), min_length=1, description="ranks, joined by commas"
    )
    seeds: Seeds = Field(1, ge=1, description="runs of each cell, with seeds from --seed on")
    base: bool = Field(True, description="a row for the untouched base")
    full: bool = Field(True, description="rows for full fine-tuning of what the adapters' towers are")
    full_lr: PeakRate | None = Field(
        None, gt=0, description="peak learning rate of full fine-tuning (default: --lr)"
    )
    test_data: UserPath | None = Field(
        None, description="more data to measure every cell on at its end: what it may forget, say"
    )
    logs: UserPath = Field(Path("logs"), description="folder of all runs")
    name: str = Field("sweep", min_length=1, description="of this sweep; the same name continues it")


class TrainSpec(Options):
    """Optimisation; names and defaults are open_clip's."""

    batch_size: Count = Field(
        64, ge=2, description="pairs in memory at once, in each process: a step, or a part of it"
    )
    epochs: Count = Field(
        32, ge=1, description="passes over the captions; more than before extend a run that is resumed"
    )
    epoch_parts: Annotated[tuple[Annotated[Count, Field(ge=1)], ...] | None, BeforeValidator(words)] = Field(
        None,
        min_length=1,
        description="epochs of each part of a run, such as 10,10: each has the learning rate's schedule for "
        "itself, as in a run of 10 epochs that is resumed with --epochs 20 (default: one part)",
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
        None, ge=1, description="epochs of cooldown at the end (const-cooldown)"
    )
    lr_cooldown_end: Rate = Field(0.0, ge=0, description="learning rate at the end of the cooldown")
    lr_cooldown_power: Power = Field(1.0, gt=0, description="shape of the cooldown, 1 is linear")
    lora_plus_ratio: Ratio = Field(
        1.0, ge=1, description="LoRA+: learning rate of the factors that start at zero, as a multiple of --lr"
    )
    grad_clip_norm: ClipNorm | None = Field(None, gt=0, description="clip the gradient to this norm")
    accum_freq: Count = Field(
        1, ge=1, description="micro-batches of --batch-size a step, with the loss of all"
    )
    grad_checkpointing: bool = Field(False, description="recompute activations instead of keeping them")
    lock_image: bool = Field(False, description="freeze the image tower")
    lock_image_unlocked_groups: Layers = Field(0, ge=0, description="groups at its end to leave trainable")
    lock_text: bool = Field(False, description="freeze the text tower")
    lock_text_unlocked_layers: Layers = Field(0, ge=0, description="layers at its end to leave trainable")
    negatives: Literal["batch", "gallery"] | None = Field(
        None,
        description="contrast with the batch, or with all features of a frozen tower (default: if it is one)",
    )
    augment: bool = Field(False, description="random crops of the training images")
    cache_views: Views | None = Field(
        None, ge=1, description="with --augment and a frozen image tower: encode this many crops of each once"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="of weights, order, dropout and crops")

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


class RunSpec(Options):
    """Where a run is kept and what it reports."""

    logs: UserPath = Field(Path("logs"), description="folder of all runs")
    name: str | None = Field(None, min_length=1, description="of this run (default: date, model, settings)")
    save_frequency: Frequency = Field(1, ge=0, description="save every N epochs; 0 saves only the last")
    val_frequency: Frequency = Field(1, ge=0, description="evaluate every N epochs; 0 only after the last")
    save_lora_only: bool = Field(
        True,
        description="save adapters alone; --no-save-lora-only adds the whole model as epoch_N.pt to each",
    )
    resume: Literal["latest"] | None = Field(
        None, description="'latest' continues the run --name where it stopped, to the same bits"
    )
    checkpoint_steps: Frequency = Field(
        0, ge=0, description="checkpoint every N steps too; 0 is once an epoch"
    )
    from_: UserPath | None = Field(
        None, description="adapter or run whose weights a new run starts from, on these data"
    )
    peft_out_proj: Literal["as-run", "as-meant"] | None = Field(
        None, description="of --from: see `clipgraft convert --help`"
    )


class EvalSpec(OverwriteSpec):
    """Evaluation of a base or an adapter on pairs."""

    adapter: UserPath | None = Field(None, description="adapter folder to evaluate beside its base")
    force: bool = Field(False, description="use an adapter that was made for another base")
    peft_out_proj: Literal["as-run", "as-meant"] | None = Field(
        None, description="see `clipgraft convert --help`"
    )
    batch_size: Batch = Field(64, ge=1, description="images or captions encoded at once")
    classifier: UserPath | None = Field(
        None, description="head/ folder of a run with --head linear or cosine, to measure too"
    )
    out: UserPath | None = Field(None, description="write the metrics to this JSON file")
