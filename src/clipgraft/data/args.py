"""Options of data: how tables of images are read, and how images become features."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field

from clipgraft.options import Gigabytes, Options, PythonOnly, UserPath, Workers, separator

DatasetType: TypeAlias = Literal[
    "auto", "csv", "tsv", "jsonl", "parquet", "folder", "webdataset", "spreadsheet", "sql"
]


class ColumnArgs(Options):
    """Where a table of images with captions or labels has what."""

    csv_img_key: str | None = Field(
        None, description="column of image paths (default: filepath, else guessed)"
    )
    csv_caption_key: str | None = Field(
        None, description="column of captions, or several joined by commas (default: title, else guessed)"
    )
    csv_separator: Annotated[str | None, BeforeValidator(separator)] = Field(
        None, min_length=1, description="column separator (default: tab, else guessed)"
    )
    csv_encoding: str | None = Field(
        None, min_length=1, description="encoding of the table, such as cp1252 (default: UTF-8, else UTF-16)"
    )
    csv_quoting: Literal["auto", "minimal", "none"] = Field(
        "auto", description="whether double quotes enclose fields; none: they are part of the text"
    )
    image_root: UserPath | None = Field(
        None, description="folder that image paths are relative to (default: the table's)"
    )
    split: str | None = Field(
        None, min_length=1, description="part of a data set, such as train, or several: train,restval"
    )
    sheet: str | None = Field(
        None, min_length=1, description="sheet of a spreadsheet, by its name or number (default: the first)"
    )
    query: str | None = Field(
        None, min_length=1, description="SELECT that gives images and captions from a SQLite or DuckDB file"
    )


class TableArgs(ColumnArgs):
    """How a table or folder of images with captions is read."""

    dataset_type: DatasetType = Field(
        "auto", description="how to read the data; auto decides by the file name"
    )
    max_bad_rows: int | None = Field(100, ge=0, description="stop when more rows than this are unreadable")
    strict: bool = Field(False, description="stop at the first unreadable row")
    keep_nulls: bool = Field(False, description="keep captions such as nan, None and N/A")


class LabelArgs(TableArgs):
    """How a table or folder of images with one class each is read."""

    csv_label_key: str | None = Field(None, description="column of class names (default: label, or guessed)")


class TranslationArgs(TableArgs):
    """How a table of texts and their translations is read."""

    csv_source_key: str | None = Field(
        None, description="column of texts that the base understands (default: source, else guessed)"
    )
    csv_target_key: str | None = Field(
        None,
        description="column of their translations, or several joined by commas (default: target, else the "
        "other of two columns)",
    )


def _folder(value: Any) -> Any:
    """The command line says `none` for no folder at all."""
    return None if str(value) == "none" else value


class CacheArgs(Options):
    """How images are decoded, and where features of frozen towers are kept."""

    workers: Workers = Field(2, ge=0, description="processes or threads that decode images")
    feature_cache: Annotated[UserPath | None, BeforeValidator(_folder)] = Field(
        None,
        description="folder that keeps features of a frozen image tower for later runs, or 'none' "
        "(default of commands: features in $CLIPGRAFT_CACHE or ~/.cache/clipgraft)",
    )
    cache_gb: Gigabytes = Field(
        20.0, gt=0, description="size limit of the feature cache in GB; the least recently used go first"
    )


class FeatureArgs(CacheArgs):
    """How images become features."""

    exact_preprocess: bool = Field(
        False, description="preprocess images exactly as the base's own transform does"
    )
    autocast: Annotated[bool | None, PythonOnly()] = Field(
        False,
        description="compute in bf16 where it is safe; None where the device is also fast at it, or as a "
        "resumed run did before",
    )
