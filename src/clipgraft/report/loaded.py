"""What a run names, found and loaded again: its base with its adapter, and its validation data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clipgraft.adapters.adapter_file import read_adapter
from clipgraft.adapters.attach import load_adapter
from clipgraft.adapters.open import tell_base
from clipgraft.adapters.run_folder import find_path
from clipgraft.data.datasets import Labelled, Pairs, match_classes, split_labelled
from clipgraft.data.prompts import class_prompts, find_templates, read_prompts
from clipgraft.data.reader import read_labelled, read_pairs
from clipgraft.errors import DataError, ModelError
from clipgraft.lora.control import lora_disabled
from clipgraft.models.clip import Clip
from clipgraft.models.load import load
from clipgraft.report.runs import Run


@dataclass(frozen=True)
class ClassData:
    """Validation images with the prompts of their classes, and how many images are no longer there."""

    images: Labelled
    prompts: tuple[tuple[str, ...], ...]
    missing: int


def sides(run: Run, device: torch.device) -> Iterator[tuple[str, Clip]]:
    """("base", the base as it is), then ("adapted", what the run made of it), one in memory at a time.

    Raises:
        ModelError, AdapterError: the base or what the run saved is not there, or cannot be read.
    """
    if run.saved is None:
        raise ModelError(f"{run.path} has saved nothing yet: finish it with --resume latest")
    name, pretrained = _base_of(run)
    tell_base(name, pretrained, f"the run {run.path}")
    base = load(name, pretrained, device=device)
    if run.kind == "lora":
        load_adapter(base, run.saved)
        with lora_disabled(base):
            yield "base", base
        yield "adapted", base
        return
    yield "base", base
    del base
    if run.saved.is_dir():
        yield "adapted", load(run.saved, device=device)
    else:
        yield "adapted", load(name, run.saved, device=device)


def _base_of(run: Run) -> tuple[str, str | None]:
    """Name and tag of the base: an adapter's own record is findable from any folder, so it comes first."""
    if run.kind == "lora" and run.saved is not None:
        base = read_adapter(run.saved).base
        if base.get("name"):
            return base["name"], base.get("pretrained") or None
    source = run.params.get("source")
    if isinstance(source, dict) and isinstance(source.get("name"), str) and source["name"]:
        return source["name"], str(source.get("pretrained") or "") or None
    name = run.params.get("model")
    if not isinstance(name, str):
        raise ModelError(f"{run.path} does not record its base: train it with `clipgraft train --model`")
    place = find_path(name, run.path)
    pretrained = run.params.get("pretrained")
    found = find_path(str(pretrained), run.path) if pretrained else None
    return str(place or name), str(found or pretrained) if pretrained else None


def read_validation_pairs(run: Run) -> tuple[Pairs, int]:
    """The validation pairs of a run that are readable, and how many of their images are not.

    Raises:
        DataError: the run names none, or nothing of them is left.
    """
    params = run.params
    pairs = read_pairs(
        _data_path(run, "val_data"),
        dataset_type=params.get("dataset_type") or "auto",
        caption_key=params.get("val_csv_caption_key") or params.get("csv_caption_key"),
        keep_nulls=bool(params.get("keep_nulls")),
        **_reading(run, "val_data"),
        max_bad_rows=None,
        verify="header",
    )
    report = pairs.report
    assert report is not None
    return pairs, report.missing_images + report.unreadable_images


def read_validation_classes(run: Run) -> ClassData:
    """The validation images of a classification run, as it had them, and the prompts of their classes.

    Raises:
        DataError: the run names none, or nothing of them is left.
    """
    params = run.params
    if params.get("val_data"):
        val, lost = _read_images(run, "val_data")
        if find_path(str(params.get("train_data")), run.path) is not None:
            val = match_classes(val, _read_images(run, "train_data")[0].classes)
    elif params.get("val_size"):
        whole, lost = _read_images(run, "train_data")
        val = split_labelled(whole, float(params["val_size"]), int(params.get("seed") or 0))[1]
    else:
        raise DataError(
            f"{run.path} has no validation data: train with --val-data or --val-size to see examples"
        )
    file = find_path(str(params["prompts"]), run.path) if params.get("prompts") else None
    if params.get("prompts") and file is None:
        raise DataError(
            f"{run.path}: its prompts {params['prompts']} are not there; run from where it was started"
        )
    templates = find_templates(params.get("templates") or "photo")
    given = None if file is None else read_prompts(file)
    return ClassData(val, class_prompts(val.classes, given, templates), lost)


def _read_images(run: Run, name: str) -> tuple[Labelled, int]:
    images = read_labelled(
        _data_path(run, name),
        label_key=_recorded(run, name, "csv_label_key"),
        **_reading(run, name),
        max_bad_rows=None,
    )
    assert images.report is not None
    return images, images.report.bad_rows


def _recorded(run: Run, name: str, key: str) -> Any:
    """What a run was given for some data: validation data may have columns of their own."""
    own = run.params.get(f"val_{key}") if name == "val_data" else None
    return own or run.params.get(key)


def _reading(run: Run, name: str) -> dict[str, Any]:
    root = _recorded(run, name, "image_root")
    return {
        "image_key": _recorded(run, name, "csv_img_key"),
        "separator": _recorded(run, name, "csv_separator"),
        "encoding": _recorded(run, name, "csv_encoding"),
        "quoting": _recorded(run, name, "csv_quoting") or "auto",
        "image_root": None if root is None else find_path(str(root), run.path) or root,
    }


def _data_path(run: Run, name: str) -> Path:
    recorded: Any = run.params.get(name)
    if not recorded:
        raise DataError(f"{run.path} does not record its --{name.replace('_', '-')}: pass it when training")
    found = find_path(str(recorded), run.path)
    if found is None:
        raise DataError(f"{run.path}: its data {recorded} are not there; run from where it was started")
    return found
