"""Flags of `clipgraft fewshot`: which images, and where the comparison goes."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from clipgraft.options import Options, UserPath


class FewShotFlags(Options):
    """What shots are drawn from, what is tested on, and where the comparison is kept."""

    dataset: str | None = Field(
        None,
        min_length=1,
        description="one of the eleven sets of few-shot papers, such as eurosat, where CoOp's DATASETS.md "
        "puts it below --root",
    )
    root: UserPath = Field(Path(), description="folder that holds the folders of the sets")
    train_data: UserPath | None = Field(
        None,
        description="images to draw shots from: a folder of class folders, a table, or CoOp's split_*.json",
    )
    test_data: UserPath | None = Field(None, description="images to test on, in the same form")
    test_size: float | None = Field(
        None, gt=0, lt=1, description="without --test-data: fraction of each class to hold out for the test"
    )
    images: UserPath | None = Field(
        None, description="folder that the paths of a CoOp split are relative to (default: the split's)"
    )
    out: UserPath = Field(
        Path("fewshot"), description="folder of the comparison; the same folder continues it"
    )
