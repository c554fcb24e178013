"""Flags of the commands that neither train nor evaluate, declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from clipgraft.cli.flags.shared import OverwriteFlags
from clipgraft.options import (
    AdapterWeight,
    Batch,
    Blocks,
    Count,
    Layers,
    LossWeight,
    Options,
    Paths,
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
    words,
)


class DemoFlags(OverwriteFlags):
    """The demonstration on the embedded default."""

    out: UserPath = Field(Path("demo"), description="folder for data, adapter, table and picture")
    train_scenes: Scenes = Field(8000, ge=100, description="scenes to adapt on")
    test_scenes: Scenes = Field(1000, ge=100, description="scenes to test on")
    epochs: Count = Field(1, ge=1, description="passes over the captions, five an image")
    language: str = Field("vi", description="language of the captions to adapt to")
    seed: int = Field(0, ge=0, lt=2**63, description="of weights, order and dropout")


class MergeFlags(OverwriteFlags):
    """What to merge, and into what."""

    adapters: Annotated[Words, Positional()] = Field(
        min_length=1, description="adapter to merge into its base, or several joined by commas"
    )
    out: Annotated[UserPath, Positional()] = Field(
        description="where to write: a folder, or for open_clip also a .pt or .safetensors file"
    )
    to: Literal["auto", "open_clip", "transformers", "onnx", "adapter"] = Field(
        "auto",
        description="open_clip, transformers, onnx: a model that stands alone; adapter: the sum of "
        "several as one; auto: the base's own library",
    )
    weights: Annotated[tuple[AdapterWeight, ...] | None, BeforeValidator(words)] = Field(
        None, description="how much of each adapter, in their order (default: 1 each)"
    )
    rank: SumRank | None = Field(None, ge=1, description="with --to adapter: cut the sum down to this rank")
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
        description="updates of attention's out_proj that PEFT made on open_clip: as it computed them "
        "(twice, or not at all), or once",
    )
    text_layers: Layers | None = Field(
        None, ge=1, description="text blocks of the base, where a CLIP-LoRA file leaves it open"
    )
    vision_layers: Layers | None = Field(None, ge=1, description="the same for vision blocks")


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
        {}, description="another value for a setting, may be repeated: text_config.num_hidden_layers=3"
    )
    targets: Annotated[tuple[str, ...] | None, BeforeValidator(expressions)] = Field(
        None,
        min_length=1,
        description="target sets, separated by semicolons; commas join the terms of one (default: all)",
    )
    lora_r: SumRank = Field(16, ge=1, description="rank of their adapters")
    depth: Layers | None = Field(None, ge=0, description="levels of the table or tree to show (default: all)")
    format: Literal["text", "json", "markdown"] = Field("text", description="how to print it")


class ProfileFlags(InspectFlags):
    """What to profile."""

    batch_size: Batch = Field(1, ge=1, description="images, and texts")
    image_size: Size | None = Field(
        None,
        description="pixels of a side, or HEIGHTxWIDTH; a CLIP is built for it (default: its own), for "
        "LLaVA-NeXT it is cut into crops (default: 480x640)",
    )
    text_tokens: Tokens | None = Field(
        None, ge=1, description="length of the texts (default: the context; for LLaVA-NeXT 64)"
    )
    crops: Tokens | None = Field(None, ge=1, description="of LLaVA-NeXT: images of the tower's size")
    language_tokens: Tokens | None = Field(None, ge=1, description="of LLaVA-NeXT: those of images included")
    logits: Tokens | None = Field(None, ge=1, description="of LLaVA-NeXT: tokens whose next one is predicted")
    adapter: UserPath | None = Field(None, description="adapter whose own cost is stated beside the base's")
    measure: bool = Field(False, description="also run it here, with random weights, and take the time")
    device: str = Field("auto", description="for --measure: auto, cpu, cuda or cuda:N")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="type of the weights")


class CompactFlags(Options):
    """Which model to make smaller, and what of it stays."""

    model: Annotated[str, Positional()] = Field(
        min_length=1, description="base to cut: emoji, an open_clip name or JSON config, hf:ID, or a folder"
    )
    out: Annotated[UserPath, Positional()] = Field(
        description="folder to write, for transformers and clipgraft; must not exist yet"
    )
    pretrained: str | None = Field(None, description="open_clip tag or local checkpoint of MODEL")
    text_layers: Layers | None = Field(
        None, description="text blocks to keep, spread evenly, the first and the last included"
    )
    vision_layers: Layers | None = Field(None, description="the same for vision blocks")
    text_blocks: Blocks | None = Field(None, description="text blocks to keep, by number: 0,5,11")
    vision_blocks: Blocks | None = Field(None, description="the same for vision blocks")
    vocab_from: Words | None = Field(
        None,
        min_length=1,
        description="keep the tokens of these texts: tables of captions, or .txt with one text a line",
    )
    vocab_size: Tokens | None = Field(
        None, ge=1, description="keep this many tokens: those of --vocab-from, then the base's first merges"
    )
    vocab_lossy: bool = Field(
        False, description="where --vocab-from needs more than --vocab-size, keep the most used"
    )


class DistillFlags(Options):
    """Distillation of the smaller model from its base."""

    distill_data: UserPath | None = Field(
        None, description="table of images and captions, or a folder of both, to train the smaller model on"
    )
    val_data: UserPath | None = Field(None, description="the same for recall of base and smaller model")
    contrastive: LossWeight = Field(0.1, ge=0, description="weight of the contrastive loss of the pairs")
    feature: LossWeight = Field(10.0, ge=0, description="weight of the distance to the base's features")
    similarity: LossWeight = Field(1.0, ge=0, description="weight of the distance to the base's similarities")
    run: UserPath | None = Field(None, description="folder of the training run (default: OUT-distill)")
    resume: Literal["latest"] | None = Field(
        None, description="'latest' continues the run where it stopped, to the same bits"
    )


class ReportFlags(OverwriteFlags):
    """What to report on, and where to write the page."""

    runs: Annotated[Paths, Positional(many=True)] = Field(
        min_length=1, description="folders of runs and sweeps, like logs/NAME"
    )
    out: UserPath = Field(Path("report.html"), description="the HTML file to write")
    examples: bool = Field(
        True,
        description="show retrieved images, confusions and similarities, which needs the base and the images",
    )
    retained: UserPath | None = Field(
        None, description="other data, such as captions in English, to measure what was forgotten on"
    )
    retained_task: Literal["retrieval", "classification"] = Field(
        "retrieval", description="what --retained is: images with captions, or images of classes"
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
