"""Load the model and the data of a run again, and compute its examples and its retention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clipgraft.adapters.attach import load_adapter
from clipgraft.adapters.folder import read_adapter
from clipgraft.adapters.open import tell_base
from clipgraft.adapters.run_folder import RunModel, find_path
from clipgraft.data.args import ColumnArgs
from clipgraft.data.datasets import Labelled, Pairs, match_classes, split_labelled
from clipgraft.data.feature_cache import FeatureCache
from clipgraft.data.features import encode_captions, encode_images
from clipgraft.data.prompts import class_prompts, find_templates, read_prompts
from clipgraft.data.reader import read_labelled, read_pairs
from clipgraft.engine.encoder import Encoder
from clipgraft.errors import DataError, ModelError
from clipgraft.evaluate.classification import (
    ClassificationResult,
    class_features,
    classification_metrics,
    evaluate_classification,
)
from clipgraft.evaluate.retrieval import evaluate_retrieval
from clipgraft.lora.control import lora_disabled
from clipgraft.models.clip import Clip, Source
from clipgraft.models.load import load
from clipgraft.report.examples import Examples, RetainedData, Retention
from clipgraft.report.runs import Run
from clipgraft.report.select_examples import Features, class_examples, retrieval_examples
from clipgraft.train.recipes.classification import load_head


@dataclass(frozen=True)
class ComputeOptions:
    """Device, loader workers and feature cache with which features are computed."""

    device: torch.device
    workers: int = 2
    cache: FeatureCache | None = None


def compute_examples(run: Run, how: ComputeOptions) -> Examples:
    """Compute the examples of a run from its base, its saved model and its validation data.

    Raises:
        ClipgraftError: its base, what it saved, or all of its validation data are not there.
    """
    return _classified(run, how) if run.task == "classification" else _retrieved(run, how)


def compute_retention(run: Run, retained: RetainedData, how: ComputeOptions) -> Retention:
    """Measure base and adapted model on other data.

    Raises:
        ClipgraftError: the base, what the run saved, or the data are not there.
    """
    measured, items = _measure_retained(run, retained, how)
    return Retention(retained.task, measured["base"], measured["adapted"], items)


def _measure_retained(
    run: Run, retained: RetainedData, how: ComputeOptions
) -> tuple[dict[str, dict[str, float]], int]:
    evaluate: Callable[[Clip, Encoder], dict[str, float]]
    options = {"workers": how.workers, "cache": how.cache}
    if retained.task == "classification":
        labelled = read_labelled(retained.path, max_bad_rows=None, **retained.keys)  # type: ignore[arg-type]
        given = None if retained.prompts is None else read_prompts(retained.prompts)
        prompts = class_prompts(labelled.classes, given, find_templates(retained.templates))
        items = len(labelled)

        def evaluate(clip: Clip, encoder: Encoder) -> dict[str, float]:
            result = evaluate_classification(clip, labelled, prompts, encoder=encoder, **options)  # type: ignore[arg-type]
            return result.metrics
    else:
        pairs = read_pairs(retained.path, max_bad_rows=None, verify="header", **retained.keys)  # type: ignore[arg-type]
        items = len(pairs)

        def evaluate(clip: Clip, encoder: Encoder) -> dict[str, float]:
            return evaluate_retrieval(clip, pairs, encoder=encoder, **options)  # type: ignore[arg-type]

    return {
        name: evaluate(clip, _encoder(run, clip)) for name, clip in base_and_adapted(run, how.device)
    }, items


def _encoder(run: Run, clip: Clip) -> Encoder:
    """Compute in the precision of the run, so that its numbers are reproduced."""
    return Encoder(clip, run.params.get("autocast") is True)


def _retrieved(run: Run, how: ComputeOptions) -> Examples:
    pairs, missing = read_validation_pairs(run)
    captions = [caption for _, caption in pairs.rows()]
    made = {}
    for name, clip in base_and_adapted(run, how.device):
        encoder = _encoder(run, clip)
        images = _image_features(run, clip, pairs.images, encoder, how)
        made[name] = Features(images, encode_captions(clip, captions, encoder=encoder))
    return retrieval_examples(pairs, made, missing)


def _classified(run: Run, how: ComputeOptions) -> Examples:
    data = read_validation_classes(run)
    labels = torch.tensor(data.images.labels)
    made: dict[str, Features] = {}
    results: dict[str, ClassificationResult] = {}
    predicted: list[int] = []
    head, names = _head(run)
    if names and names != data.images.classes:
        head = None
    for name, clip in base_and_adapted(run, how.device):
        encoder = _encoder(run, clip)
        images = _image_features(run, clip, data.images.images, encoder, how)
        made[name] = Features(images, class_features(encoder, data.prompts))
        logits = clip.logit_scale.detach().float().exp().cpu() * images @ made[name].texts.T
        if name == "adapted" and head is not None:
            with torch.no_grad():
                logits = head(images)
        results[name] = classification_metrics(logits, labels, data.images.classes)
        predicted = logits.argmax(1).tolist()
    kind = str(run.params.get("head")) if head is not None else ""
    return class_examples(data.images, made, results, predicted, data.missing, kind)


def _head(run: Run) -> tuple[torch.nn.Module | None, tuple[str, ...]]:
    """Load the classification head that the run trained, with its classes; (None, ()) if it trained none."""
    folder = run.path / "head"
    return load_head(folder) if folder.is_dir() else (None, ())


def _image_features(
    run: Run, clip: Clip, images: tuple[Path, ...], encoder: Encoder, how: ComputeOptions
) -> torch.Tensor:
    return encode_images(
        clip,
        images,
        workers=how.workers,
        encoder=encoder,
        cache=how.cache,
        exact_preprocess=run.params.get("exact_preprocess") is True,
    )


@dataclass(frozen=True)
class ClassData:
    """Validation images with the prompts of their classes, and the number of images that are missing."""

    images: Labelled
    prompts: tuple[tuple[str, ...], ...]
    missing: int


def base_and_adapted(run: Run, device: torch.device) -> Iterator[tuple[str, Clip]]:
    """Load ("base", what the run began with), then ("adapted", what it made of it), one at a time.

    Raises:
        ModelError, AdapterError: the base or what the run saved is not there, or cannot be read.
    """
    model = run.model
    if model is None:
        raise ModelError(f"{run.path} has saved nothing yet: finish it first, with `resume`")
    source = _base_of(model)
    tell_base(source.name, source.pretrained or None, f"the run {run.path}")
    base = load(source.name, source.pretrained or None, device=device)
    if model.kind == "adapter":
        load_adapter(base, model.saved)
        with lora_disabled(base):
            yield "base", base
        yield "adapted", base
        return
    yield "base", base
    del base
    weights = model.weights
    yield "adapted", load(weights.name, weights.pretrained or None, device=device)


def _base_of(model: RunModel) -> Source:
    """Name the base; the adapter's own record comes first, since it holds for any working directory."""
    base = read_adapter(model.saved).base if model.kind == "adapter" else {}
    if base.get("name"):
        return Source(base["name"], base.get("pretrained") or "")
    if not model.base.name:
        raise ModelError(f"{model.run} does not record its base: train it with `model`")
    return model.base


def read_validation_pairs(run: Run) -> tuple[Pairs, int]:
    """Read the validation pairs of a run; returns them and the number of images that cannot be read.

    Raises:
        DataError: the run names none, or nothing of them is left.
    """
    params = run.params
    pairs = read_pairs(
        _data_path(run, "val_data"),
        dataset_type=params.get("dataset_type") or "auto",
        keep_nulls=bool(params.get("keep_nulls")),
        **_reading(run, "val_data"),
        max_bad_rows=None,
        verify="header",
    )
    report = pairs.report
    assert report is not None
    return pairs, report.missing_images + report.unreadable_images


def read_validation_classes(run: Run) -> ClassData:
    """Read the validation images of a classification run as it split them, with the prompts of their classes.

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
            f"{run.path} has no validation data: train with `val_data` or `val_size` to see examples"
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
        csv_label_key=_recorded(run, name, "csv_label_key"),
        **_reading(run, name),
        max_bad_rows=None,
    )
    assert images.report is not None
    return images, images.report.bad_rows


def _recorded(run: Run, name: str, key: str) -> Any:
    """Look up an option of some data in the run's record; validation data may have its own columns."""
    own = run.params.get(f"val_{key}") if name == "val_data" else None
    return own or run.params.get(key)


def _reading(run: Run, name: str) -> dict[str, Any]:
    """Return how a run's table is read, as `ColumnArgs` has it."""
    found = {key: _recorded(run, name, key) for key in ColumnArgs.model_fields}
    root = found["image_root"]
    if root is not None:
        found["image_root"] = find_path(str(root), run.path) or root
    return {key: value for key, value in found.items() if value is not None}


def _data_path(run: Run, name: str) -> Path:
    recorded: Any = run.params.get(name)
    if not recorded:
        raise DataError(f"{run.path} does not record its `{name}`: name it when training")
    found = find_path(str(recorded), run.path)
    if found is None:
        raise DataError(f"{run.path}: its data {recorded} are not there; run from where it was started")
    return found
