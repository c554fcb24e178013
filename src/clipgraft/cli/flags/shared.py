"""Flags that several commands have: the model, the machine, tables, classes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from clipgraft.data.args import CacheArgs, FeatureArgs, TableArgs
from clipgraft.options import (
    Options,
    Precision,
    UserPath,
    part,
    separator,
)


class OverwriteFlags(Options):
    """What may be replaced."""

    overwrite: bool = Field(
        False, description="replace an existing file or folder even if clipgraft did not write it"
    )


class DeviceFlags(Options):
    """Where a model runs, and in what precision."""

    device: str = Field(
        "auto", description="auto, cpu, cuda, cuda:N, or another accelerator's name (mps, xpu)"
    )
    precision: Precision = Field(
        "auto",
        description="amp_bf16: autocast to bf16; auto: amp_bf16 where that is faster on this machine; "
        "bf16: also store the base in bf16",
    )

    @property
    def autocast(self) -> bool | None:
        """Whether to compute in bf16 on a base that is stored in fp32; None leaves it to a measurement."""
        return None if self.precision == "auto" else self.precision == "amp_bf16"


class ModelFlags(DeviceFlags):
    """Which base, and where it runs."""

    model: str = Field(
        "emoji", description="emoji, an open_clip name or JSON config, hf:ID, or a local folder"
    )
    pretrained: str | None = Field(
        None, description="open_clip tag, local checkpoint, or 'none' for random weights"
    )


class TableFlags(TableArgs, FeatureArgs):
    """How tables of images and captions are read, and their images made features."""


class DataFlags(TableFlags):
    """Images and captions."""

    train_data: UserPath | None = Field(
        None,
        description="table of images and captions, a folder of both, or tar files: 'shards/{000..099}.tar'; "
        "with --recipe translate a table of translations",
    )
    val_data: UserPath | None = Field(None, description="validation data, in the same form")
    val_csv_img_key: str | None = Field(None, description="--csv-img-key of --val-data, if it differs")
    val_csv_caption_key: str | None = Field(
        None, description="--csv-caption-key of --val-data, if it differs"
    )
    val_csv_separator: Annotated[str | None, BeforeValidator(separator)] = Field(
        None, min_length=1, description="--csv-separator of --val-data, if it differs"
    )
    val_csv_encoding: str | None = Field(
        None, min_length=1, description="--csv-encoding of --val-data, if it differs"
    )
    val_csv_quoting: Literal["auto", "minimal", "none"] | None = Field(
        None, description="--csv-quoting of --val-data, if it differs"
    )
    val_image_root: UserPath | None = Field(None, description="--image-root of --val-data, if it differs")
    val_split: str | None = Field(None, min_length=1, description="--split of --val-data, such as val")
    val_sheet: str | None = Field(None, min_length=1, description="--sheet of --val-data")
    val_query: str | None = Field(None, min_length=1, description="--query of --val-data")

    def for_validation(self) -> DataFlags:
        """The same, with the columns of the validation data in place of the training data's.

        The part of the training data is none of the validation data: part, sheet and query are its own.
        """
        given = {name: getattr(self, name) for name in type(self).model_fields if name.startswith("val_")}
        other = {name.removeprefix("val_"): value for name, value in given.items() if value is not None}
        own = dict.fromkeys(("split", "sheet", "query")) if self.train_data is not None else {}
        return self.model_copy(update={**own, **{name: other[name] for name in other if name != "data"}})

    def for_test(self) -> DataFlags:
        """The same for test data: of data in parts, the part `test`."""
        return self if self.split is None else self.model_copy(update={"split": "test"})


class PromptFlags(Options):
    """What the classes are, and what is said for them."""

    csv_label_key: str | None = Field(
        None, description="column of class names (default: label, else guessed)"
    )
    prompts: UserPath | None = Field(None, description="YAML of class: prompt, or class: [prompts]")
    templates: str = Field(
        "photo", description="templates for classes without prompts: photo, ensemble, or a text with {} in it"
    )


class ClassFlags(PromptFlags):
    """Telling classes apart."""

    val_csv_label_key: str | None = Field(None, description="--csv-label-key of --val-data, if it differs")
    task: Literal["retrieval", "classification"] = Field(
        "retrieval",
        description="retrieval: match images with captions; classification: predict the class of an image",
    )

    def for_validation(self) -> ClassFlags:
        """The same, with the label column of the validation data."""
        key = self.val_csv_label_key or self.csv_label_key
        return self.model_copy(update={"csv_label_key": key})


def features_of(flags: CacheArgs, autocast: bool | None = False) -> FeatureArgs:
    """How a command makes features: by default it keeps them in the folder that all commands share."""
    from clipgraft.data.feature_cache import default_folder

    found = part(flags, FeatureArgs, autocast=autocast)
    given = "feature_cache" in flags.model_fields_set
    return found if given else found.replace(feature_cache=default_folder())
