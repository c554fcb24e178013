"""Flags of training, sweeps and evaluation that only the command line has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from clipgraft.cli.flags.groups import Group
from clipgraft.cli.flags.shared import ClassFlags, OverwriteFlags
from clipgraft.data.args import TranslationArgs
from clipgraft.lora.config import Bias, Initialization, LoraConfig, Variant
from clipgraft.options import (
    Alpha,
    AlphaPattern,
    AutoWeight,
    Batch,
    Count,
    Dropout,
    Options,
    PeakRate,
    Rank,
    RankPattern,
    Repeated,
    Seeds,
    Settings,
    UserPath,
    Words,
    expressions,
    words,
)
from clipgraft.train.args import HeadArgs, RunArgs, TranslateArgs

DEFAULT_TARGETS = "text-matrices"
"""Of a command: every matrix of the text tower. Without words' embeddings no new language is learnt."""


class ClassTrainFlags(ClassFlags, HeadArgs):
    """Training to tell classes apart."""

    val_size: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="fraction of each class, or of the translations, to hold out for validation (default: no "
        "class; a tenth of the translations, at most 1,000)",
    )
    shots: Count | None = Field(None, ge=1, description="train on this many images of each class")
    class_weights: bool = Field(False, description="give rare classes more weight in the loss")


def _option(name: str, **changes: Any) -> Any:
    """A field of `LoraConfig`, changed where the command line differs."""
    option = LoraConfig.model_fields[name]
    given = {"default": option.default, "description": option.description, **changes}
    return Field(**given)


def _column(name: str) -> Any:
    return Field(None, description=TranslationArgs.model_fields[name].description)


_OF_SITES = ("r", "targets", "target_modules")


class AdapterFlags(Options):
    """The adapter, whatever its size."""

    library_names: ClassVar[Mapping[str, str]] = {
        "r": "lora_r",
        "alpha": "lora_alpha",
        "dropout": "lora_dropout",
        "targets": "lora_targets",
        "target_modules": "lora_target_modules",
        "variant": "lora_variant",
        "variant_options": "lora_variant_options",
        "use_rslora": "lora_rslora",
        "use_dora": "lora_dora",
        "bias": "lora_bias",
        "init": "lora_init",
        "rank_pattern": "lora_rank_pattern",
        "alpha_pattern": "lora_alpha_pattern",
        "train_logit_scale": "lora_train_logit_scale",
    }
    """The flags of the fields of `LoraConfig` and its shorthands, in field spelling."""

    lora_alpha: Alpha | None = _option("alpha", default=None)
    lora_dropout: Dropout = _option("dropout", default=0.1)
    lora_variant: Variant | None = _option("variant", default=None)
    lora_variant_options: Annotated[Settings, Repeated()] = _option("variant_options")
    lora_rslora: bool = _option("use_rslora")
    lora_dora: bool = Field(False, description="short for --lora-variant dora")
    lora_bias: Bias = _option("bias")
    lora_init: Initialization = _option("init")
    lora_rank_pattern: RankPattern = _option("rank_pattern")
    lora_alpha_pattern: AlphaPattern = _option("alpha_pattern")
    lora_train_logit_scale: bool = _option("train_logit_scale")

    def adapter(self, r: int, targets: str) -> LoraConfig:
        """The options of an adapter of a rank on a target set.

        Raises:
            ConfigError: they name two variants.
        """
        flags = {field: flag for field, flag in self.library_names.items() if field not in _OF_SITES}
        values = {field: getattr(self, flag) for field, flag in flags.items()}
        if values["variant"] is None:
            del values["variant"]
        return LoraConfig(r=r, targets=targets, **values)


class LoraFlags(AdapterFlags):
    """The adapter."""

    use_lora: bool = Field(
        False, description="train a LoRA adapter; without it the model itself is fine-tuned"
    )
    lora_r: Rank = Field(16, description="rank, or 'auto' to choose one from the number of training pairs")
    lora_targets: str | None = Field(
        None,
        description="target set or sites, e.g. text-attention or text.*.q,v (default: text-matrices, every "
        "matrix of the text tower)",
    )
    lora_target_modules: Words | None = Field(
        None, description="the guide's names for text sites: in_proj,out_proj,c_fc,c_proj"
    )

    @property
    def asked_targets(self) -> str | None:
        """The sites that either flag names; None if none does. Raises TargetError for a name of no site."""
        from clipgraft.lora.targets import guide_targets

        return (
            self.lora_targets if self.lora_target_modules is None else guide_targets(self.lora_target_modules)
        )


class SweepFlags(AdapterFlags):
    """The grid, and the adapters in it."""

    targets: Annotated[tuple[str, ...], BeforeValidator(expressions)] = Field(
        (DEFAULT_TARGETS,),
        min_length=1,
        description="target sets to compare, separated by semicolons; commas join the terms of one set",
    )
    lora_r: Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(words)] = Field(
        (16,), min_length=1, description="ranks, joined by commas"
    )
    seeds: Seeds = Field(1, ge=1, description="runs per cell, with seeds counted from --seed")
    base: bool = Field(True, description="include the untouched base")
    full: bool = Field(True, description="include full fine-tuning of the towers that the adapters are in")
    full_lr: PeakRate | None = Field(
        None, gt=0, description="peak learning rate of full fine-tuning (default: --lr)"
    )
    test_data: UserPath | None = Field(
        None, description="more data to measure every cell on, for example to see what it forgets"
    )
    logs: UserPath = Field(Path("logs"), description="folder that holds the runs")
    name: str = Field("sweep", min_length=1, description="name of the sweep; the same name continues it")


RUN = Group(
    RunArgs,
    told={
        "out": "--name",
        "resume": "--resume",
        "resume=True": "--resume latest",
        "apply_lora": "--use-lora",
        "fit_classifier": "--task classification",
        "autocast=False": "--precision fp32",
    },
    fixed={"out": Path()},
)


class RetainFlags(Options):
    """What is not to be forgotten."""

    retain: str | None = Field(
        None,
        min_length=1,
        description="texts on which the model is to stay as its base is: a .txt, a table or folder of pairs, "
        "whose pictures hold an image tower that trains; auto: texts that ship with clipgraft; none "
        "(default: auto, but none where --lr is given)",
    )
    retain_weight: AutoWeight = Field(
        "auto",
        description="how much the distance from the base counts beside the loss; auto tries several on a "
        "part of the training data, for 5 % of the run's steps",
    )


class TranslateFlags(TranslateArgs):
    """Learning a language from translations."""

    recipe: Literal["translate"] | None = Field(
        None,
        description="translate: learn a language from texts and their translations in --train-data, without "
        "pictures (default: as --task says)",
    )
    csv_source_key: str | None = _column("csv_source_key")
    csv_target_key: str | None = _column("csv_target_key")
    pairs: UserPath | None = Field(
        None, description="with --recipe translate: images with captions to train on too, in any number"
    )
    val_pairs: UserPath | None = Field(
        None, description="with --recipe translate: images with captions to evaluate on"
    )


class RunFlags(Options):
    """Where a run is kept, and what it goes on from."""

    logs: UserPath = Field(Path("logs"), description="folder that holds the runs")
    name: str | None = Field(
        None, min_length=1, description="name of the run (default: date, model and settings)"
    )
    resume: Literal["latest"] | None = Field(
        None, description="'latest' continues the run --name where it stopped, with bit-identical results"
    )
    from_: UserPath | None = Field(None, description="adapter or run whose weights a new run starts from")
    push_to_hub: str | None = Field(
        None,
        pattern=r"^[\w.-]+/[\w.-]+$",
        description="publish the adapter as OWNER/NAME at the Hugging Face hub once it is trained, as "
        "`clipgraft push` does",
    )
    peft_out_proj: Literal["as-run", "as-meant"] | None = Field(
        None, description="for the adapter of --from: see `clipgraft convert --help`"
    )


class EvalFlags(OverwriteFlags):
    """Evaluation of a base or an adapter on pairs."""

    adapter: UserPath | None = Field(None, description="adapter folder to evaluate beside its base")
    force: bool = Field(False, description="use an adapter that was made for another base")
    peft_out_proj: Literal["as-run", "as-meant"] | None = Field(
        None, description="see `clipgraft convert --help`"
    )
    batch_size: Batch = Field(64, ge=1, description="images or captions encoded at once")
    classifier: UserPath | None = Field(
        None, description="head/ folder of a run with --head linear or cosine, measured too"
    )
    learn_prompts: UserPath | None = Field(
        None,
        description="learn on --train-data how much each of several prompts counts, and write them to this "
        "YAML file for --prompts",
    )
    out: UserPath | None = Field(None, description="write the metrics to this JSON file")
    fiftyone: UserPath | None = Field(
        None, description="write what each model answers for every image to this folder, for FiftyOne"
    )
