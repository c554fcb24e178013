"""Flags of encoding and searching, declared once."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from clipgraft.cli.flags.shared import OverwriteFlags
from clipgraft.data.args import ColumnArgs, DatasetType
from clipgraft.options import (
    Positional,
    Results,
    UserPath,
    Words,
)


class EncodeFlags(ColumnArgs):
    """What to encode, and where to."""

    source: Annotated[str, Positional()] = Field(
        description="folder of images, table with a column of image paths, tar files "
        "(a-{000..099}.tar), or the address of a folder or of tar files (s3://…)"
    )
    out: Annotated[UserPath, Positional()] = Field(
        description="folder for vectors and metadata; a second run encodes only what has changed"
    )
    adapter: UserPath | None = Field(None, description="adapter to encode with")
    adapters: Words | None = Field(
        None,
        min_length=1,
        description="several adapters in one pass over the images, each with a folder of its own",
    )
    dataset_type: DatasetType = Field(
        "auto", description="how to read a table; auto decides by the file name"
    )
    force: bool = Field(False, description="use adapters that were made for another base")
    peft_out_proj: Literal["as-run", "as-meant"] | None = Field(
        None, description="see `clipgraft convert --help`"
    )
    to: str = Field(
        "npy",
        min_length=1,
        description="also copy the vectors there: parquet, lance (in OUT), or what `clipgraft index --to` "
        "takes; npy: no copy",
    )


class IndexFlags(OverwriteFlags):
    """What to index, and how."""

    out: Annotated[UserPath, Positional()] = Field(description="folder that `clipgraft encode` wrote")
    factory: str = Field(
        "Flat",
        min_length=1,
        description="kind of index, as FAISS names it: Flat is exact; IVF256,Flat or HNSW32 are faster",
    )
    to: str | None = Field(
        None,
        min_length=1,
        description="copy the vectors to another program instead, or what has changed since: "
        "pgvector://USER@HOST/DATABASE, lancedb:FOLDER, qdrant:FOLDER, qdrant:http://HOST:6333, each with "
        "?table=NAME, or parquet:FILE, lance:FOLDER/NAME.lance",
    )


class SearchFlags(OverwriteFlags):
    """What to search, and for what."""

    out: Annotated[UserPath, Positional()] = Field(description="folder that `clipgraft encode` wrote")
    text: Annotated[str | None, Positional()] = Field(
        None, description="text to search for; - reads texts from standard input, one per line"
    )
    image: UserPath | None = Field(None, description="image to search for, alone or together with the text")
    image_weight: float = Field(0.5, ge=0, le=1, description="weight of the image if a text is given too")
    k: Results = Field(10, ge=1, description="number of results")
    adapter: str | None = Field(
        None, min_length=1, description="adapter to search with: a folder, or the name it was encoded under"
    )
    where: str | None = Field(
        None, description="condition that results must meet, such as: caption~cat and width>=640"
    )
    format: Literal["table", "json"] = Field("table", description="how to print the results")
    html: UserPath | None = Field(None, description="also write a page of thumbnails")
    model: str | None = Field(None, min_length=1, description="base, if it is not where the folder says")
    pretrained: str | None = Field(None, description="open_clip tag or local checkpoint of --model")
    device: str = Field(
        "auto", description="auto, cpu, cuda, cuda:N, or another accelerator's name (mps, xpu)"
    )
    peft_out_proj: Literal["as-run", "as-meant"] | None = Field(
        None, description="see `clipgraft convert --help`"
    )
    force: bool = Field(False, description="use an adapter that was made for another base")
