"""Flags of the commands that neither train nor evaluate, declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from clipgraft.cli.flags.groups import Group
from clipgraft.cli.flags.shared import OverwriteFlags
from clipgraft.compact.args import CompactArgs
from clipgraft.models.forms.names import Form
from clipgraft.options import (
    AdapterWeight,
    Batch,
    Count,
    Layers,
    Options,
    Paths,
    Points,
    Positional,
    Repeated,
    Scenes,
    Settings,
    Size,
    SumRank,
    Tokens,
    UserPath,
    Words,
    expressions,
    shares,
    words,
)
from clipgraft.train.args import DistillArgs


class DemoFlags(OverwriteFlags):
    """The demonstration on the embedded default."""

    out: UserPath = Field(Path("demo"), description="folder for data, adapter, table and picture")
    train_scenes: Scenes = Field(8000, ge=100, description="scenes to adapt on")
    test_scenes: Scenes = Field(1000, ge=100, description="scenes to test on")
    epochs: Count = Field(1, ge=1, description="passes over the captions, of which every image has five")
    language: str = Field("vi", description="language of the captions to adapt to")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of weights, order and dropout")


class MergeFlags(OverwriteFlags):
    """What to merge, and into what."""

    adapters: Annotated[Words, Positional()] = Field(
        min_length=1, description="adapter to merge into its base, or several joined by commas"
    )
    out: Annotated[UserPath, Positional()] = Field(
        description="where to write: a folder; open_clip also takes a .pt or .safetensors file"
    )
    to: Literal["auto", Form, "adapter"] = Field(
        "auto",
        description="a model that stands alone, for what the name says (comfyui: one file); adapter: the sum "
        "of several as one; auto: the base's own library",
    )
    gate: UserPath | None = Field(
        None, description="with --to onnx-int8: table of images and captions on which recall is measured"
    )
    max_recall_loss: Points | None = Field(
        None,
        ge=0,
        description="percentage points of recall@1, 5 or 10 that int8 may lose at most (default: 1)",
    )
    weights: Annotated[tuple[AdapterWeight, ...] | None, BeforeValidator(words)] = Field(
        None, description="weight of each adapter, in their order (default: 1 each)"
    )
    average: bool = Field(
        False, description="average the adapters, such as those of several seeds: a weight of 1/n each"
    )
    rank: SumRank | None = Field(None, ge=1, description="with --to adapter: truncate the sum to this rank")
    eval: UserPath | None = Field(
        None,
        description="with --to adapter: data on which each adapter and what is made of them are measured",
    )
    eval_task: Literal["retrieval", "classification"] = Field(
        "retrieval", description="with --eval: images with captions, or labelled images"
    )
    model: str | None = Field(
        None, min_length=1, description="base of adapters that do not name their own, as for training"
    )
    pretrained: str | None = Field(None, description="open_clip tag or local checkpoint of --model")
    peft_out_proj: Literal["as-run", "as-meant"] | None = Field(
        None, description="see `clipgraft convert --help`"
    )
    force: bool = Field(False, description="use adapters that were made for another base")


class ConvertFlags(OverwriteFlags):
    """What to convert, and into which format."""

    src: Annotated[UserPath, Positional()] = Field(
        description="adapter to read: a folder, or a .pt file of the guide or of CLIP-LoRA"
    )
    out: Annotated[UserPath, Positional()] = Field(description="where to write; must not exist yet")
    to: Literal["peft", "guide", "guide-full", "clip-lora"] = Field(
        description="peft: a folder that PEFT and clipgraft open; guide: a .pt of the LoRA weights; "
        "guide-full: one with the base's too; clip-lora: a .pt of MaxZanella/CLIP-LoRA"
    )
    model: str | None = Field(
        None, min_length=1, description="base of an adapter that does not name its own, as for training"
    )
    pretrained: str | None = Field(None, description="open_clip tag or local checkpoint of --model")
    peft_out_proj: Literal["as-run", "as-meant"] | None = Field(
        None,
        description="how to read out_proj updates that PEFT trained on open_clip: as PEFT computed "
        "them (twice, or not at all), or applied once",
    )
    text_layers: Layers | None = Field(
        None, ge=1, description="number of text blocks of the base, if a CLIP-LoRA file does not tell"
    )
    vision_layers: Layers | None = Field(None, ge=1, description="the same for the vision tower")


class InspectFlags(Options):
    """What to look at."""

    model: Annotated[str, Positional()] = Field(
        min_length=1,
        description="emoji, an open_clip name or JSON config, hf:ID, a transformers config.json, or a "
        "folder of a model, adapter or run",
    )
    pretrained: str | None = Field(
        None, description="open_clip tag, which decides on QuickGELU; no weights are fetched"
    )
    set: Annotated[Settings, Repeated()] = Field(
        {}, description="override a setting, such as text_config.num_hidden_layers=3; may be repeated"
    )
    targets: Annotated[tuple[str, ...] | None, BeforeValidator(expressions)] = Field(
        None,
        min_length=1,
        description="target sets, separated by semicolons; commas join the terms of one (default: all)",
    )
    lora_r: SumRank = Field(16, ge=1, description="rank of the adapters")
    depth: Layers | None = Field(None, ge=0, description="levels of the table or tree to show (default: all)")
    format: Literal["text", "json", "markdown"] = Field("text", description="how to print it")


class ProfileFlags(InspectFlags):
    """What to profile."""

    batch_size: Batch = Field(1, ge=1, description="number of images, and of texts")
    image_size: Size | None = Field(
        None,
        description="side in pixels, or HEIGHTxWIDTH; CLIP is built for this size (default: its own), "
        "LLaVA-NeXT cuts it into crops (default: 480x640)",
    )
    text_tokens: Tokens | None = Field(
        None, ge=1, description="length of the texts (default: the context; for LLaVA-NeXT 64)"
    )
    crops: Tokens | None = Field(None, ge=1, description="LLaVA-NeXT: number of crops")
    language_tokens: Tokens | None = Field(
        None, ge=1, description="LLaVA-NeXT: tokens of the language model, including those of images"
    )
    logits: Tokens | None = Field(None, ge=1, description="LLaVA-NeXT: number of tokens with logits")
    adapter: UserPath | None = Field(None, description="adapter whose cost is shown beside the base's")
    measure: bool = Field(False, description="also run the model here, with random weights, and time it")
    device: str = Field(
        "auto", description="for --measure: auto, cpu, cuda, cuda:N, or another accelerator's name (mps, xpu)"
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="type of the weights")


class CompactFlags(CompactArgs):
    """Which model to make smaller, and what of it stays."""

    model: Annotated[str, Positional()] = Field(
        min_length=1, description="base to cut: emoji, an open_clip name or JSON config, hf:ID, or a folder"
    )
    out: Annotated[UserPath, Positional()] = Field(
        description="folder to write, for transformers and clipgraft; must not exist yet"
    )
    pretrained: str | None = Field(None, description="open_clip tag or local checkpoint of MODEL")
    vocab_from: Words | None = Field(
        None,
        min_length=1,
        description="keep the tokens of these texts: tables of captions, or .txt with one text a line",
    )


COMPACT = Group(CompactFlags, told={"texts": "--vocab-from"})


class DistillFlags(DistillArgs):
    """Distillation of the smaller model from its base."""

    distill_data: UserPath | None = Field(
        None, description="table of images and captions, or a folder of both, to train the smaller model on"
    )
    val_data: UserPath | None = Field(
        None, description="validation data, for the recall of base and smaller model"
    )
    run: UserPath | None = Field(None, description="folder of the training run (default: OUT-distill)")
    resume: Literal["latest"] | None = Field(
        None, description="'latest' continues the run where it stopped, with bit-identical results"
    )


DISTILL = Group(
    DistillFlags,
    told={"out": "--run", "resume=True": "--resume latest", "autocast=False": "--precision fp32"},
)


class ReportFlags(OverwriteFlags):
    """What to report on, and where to write the page."""

    runs: Annotated[Paths, Positional(many=True)] = Field(
        min_length=1, description="folders of runs and sweeps, like logs/NAME"
    )
    out: UserPath = Field(Path("report.html"), description="the HTML file to write")
    examples: bool = Field(
        True,
        description="show retrieved images, confusions and similarities; needs the base and the images",
    )
    retained: UserPath | None = Field(
        None, description="other data, such as English captions, on which to measure what was forgotten"
    )
    retained_task: Literal["retrieval", "classification"] = Field(
        "retrieval", description="kind of --retained: images with captions, or images with classes"
    )
    device: str = Field(
        "auto", description="auto, cpu, cuda, cuda:N, or another accelerator's name (mps, xpu)"
    )


class PushFlags(Options):
    """What to publish, and where."""

    run: Annotated[UserPath, Positional()] = Field(description="folder of a run, or of an adapter")
    repository: Annotated[str, Positional()] = Field(description="OWNER/NAME at the Hugging Face hub")
    dry_run: bool = Field(False, description="print the card, and what would be uploaded; upload nothing")


class ExamineFlags(OverwriteFlags):
    """What is shown of a data set, and how it is split."""

    source: Annotated[UserPath, Positional()] = Field(
        description="table of images and captions, a folder of both, or tar files"
    )
    out: UserPath | None = Field(None, description="folder for train.csv, val.csv and test.csv")
    split: Annotated[tuple[float, ...] | None, BeforeValidator(shares)] = Field(
        None,
        description="split by image into train, val and test, such as 80/10/10, or 90/10; images that are "
        "alike stay together",
    )
    contact_sheet: UserPath | None = Field(
        None, description="write many of the images into one picture, a .jpg or .png"
    )
    near: float = Field(
        0.97, gt=0, le=1, description="with --model: cosine from which two images are nearly the same"
    )
    odd: int = Field(
        10, ge=0, le=10_000, description="with --model: how many of the least similar pairs are shown"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the split")
