"""Read the data that a command is given, with a progress bar and a printed summary."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from clipgraft.cli.flags.shared import ClassFlags, DataFlags, TableFlags
from clipgraft.data.args import LabelArgs
from clipgraft.data.datasets import Labelled, Pairs
from clipgraft.data.prompts import class_prompts, find_templates, read_prompts
from clipgraft.data.reader import read_labelled, read_pairs
from clipgraft.models.clip import Clip
from clipgraft.options import part
from clipgraft.progress import showing

log = logging.getLogger("clipgraft")


def read_table(clip: Clip, path: Path, spec: TableFlags, what: str) -> Pairs:
    """Read and check pairs, and print the summary of them."""
    with showing(None, f"checking {what}") as progress:
        pairs = read_pairs(path, spec, workers=spec.workers, progress=progress)
    captions = [caption for group in pairs.captions for caption in group]
    assert pairs.report is not None
    report = pairs.report.with_long_captions(captions, clip.count_tokens, clip.context_length)
    log.info("%s", report.summary())
    return pairs


def read_images(
    path: Path, data: DataFlags, classes: ClassFlags, what: str, validation: bool = False
) -> Labelled:
    """Read a set of labelled images and print its summary; `validation` data may have its own columns."""
    columns = data.for_validation() if validation else data
    label = (classes.for_validation() if validation else classes).csv_label_key
    args = part(columns, LabelArgs, csv_label_key=label, dataset_type="auto")
    with showing(None, f"checking {what}") as progress:
        images = read_labelled(path, args, workers=data.workers, progress=progress)
    assert images.report is not None
    log.info("%s", images.report.summary())
    return images


def prompts_of(names: Sequence[str], classes: ClassFlags) -> tuple[Sequence[str], ...]:
    """Make the prompts of each class from the YAML file and the templates."""
    given = None if classes.prompts is None else read_prompts(classes.prompts)
    return class_prompts(names, given, find_templates(classes.templates))
