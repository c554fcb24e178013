"""Load the model and the data of a run again, measure what it forgot, and select the examples to show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipgraft.adapters.attach import load_adapter
from clipgraft.adapters.folder import read_adapter
from clipgraft.adapters.open import tell_base
from clipgraft.adapters.run_folder import RunModel, find_path
from clipgraft.data.args import ColumnArgs, FeatureArgs
from clipgraft.data.datasets import Labelled, Pairs, match_classes, split_labelled
from clipgraft.data.features import encode_captions, encode_images
from clipgraft.data.prompts import class_prompts, find_templates, read_prompts
from clipgraft.data.reader import read_labelled, read_pairs
from clipgraft.engine.encoder import Encoder
from clipgraft.errors import DataError, ModelError
from clipgraft.evaluate.answers import image_answers
from clipgraft.evaluate.classification import (
    ClassificationResult,
    class_features,
    classification_metrics,
    evaluate_classification,
    prompt_logits,
)
from clipgraft.evaluate.error_analysis import RetrievalErrors, analyse_errors
from clipgraft.evaluate.head import load_head
from clipgraft.evaluate.ranks import RetrievalRanks, retrieval_ranks
from clipgraft.evaluate.retrieval import evaluate_retrieval, retrieval_metrics
from clipgraft.lora.control import lora_disabled
from clipgraft.models.clip import Clip, Source
from clipgraft.models.load import load
from clipgraft.report.examples import (
    Classes,
    Examples,
    Found,
    Pair,
    Query,
    QueryKind,
    RetainedData,
    Retention,
    Similarities,
    find_data,
)
from clipgraft.report.runs import Run

TOP = 5
SHOWN: dict[QueryKind, int] = {"fixed": 4, "broken": 2, "both wrong": 2, "both right": 1}
HEAT = 12
PAIRS, PICTURES = 6, 4


@dataclass(frozen=True)
class ComputeOptions:
    """The device, and how images become features where the run does not say it."""

    device: torch.device
    features: FeatureArgs


def compute_examples(run: Run, how: ComputeOptions) -> Examples:
    """Compute the examples of a run from its base, its saved model and its validation data.

    Raises:
        ClipgraftError: its base, what it saved, or all of its validation data are not there.
    """
    if run.params.get("recipe") == "translate":
        raise DataError("it learnt from translations, which have no pictures to show")
    return _classified(run, how) if run.task == "classification" else _retrieved(run, how)


def compute_retention(run: Run, retained: RetainedData, how: ComputeOptions) -> Retention:
    """Measure base and adapted model on other data.

    Raises:
        ClipgraftError: the base, what the run saved, or the data are not there.
    """
    # In the precision of the run, so that its numbers are reproduced.
    features = how.features.replace(autocast=_in_bf16(run))
    models = base_and_adapted(run, how.device)
    keys: dict[str, Any] = {**retained.keys, "max_bad_rows": None}
    if retained.task == "classification":
        labelled = read_labelled(retained.path, **keys)
        given = None if retained.prompts is None else read_prompts(retained.prompts)
        prompts = class_prompts(labelled.classes, given, find_templates(retained.templates))
        results = {
            name: evaluate_classification(clip, labelled, prompts, features).metrics for name, clip in models
        }
        return Retention(retained.task, results["base"], results["adapted"], len(labelled))
    pairs = read_pairs(retained.path, verify="header", **keys)
    results = {name: evaluate_retrieval(clip, pairs, features) for name, clip in models}
    return Retention(retained.task, results["base"], results["adapted"], len(pairs))


def _in_bf16(run: Run) -> bool:
    return run.params.get("autocast") is True


def _retrieved(run: Run, how: ComputeOptions) -> Examples:
    pairs, missing = read_validation_pairs(run)
    captions = [caption for _, caption in pairs.rows()]
    features = _as_the_run(run, how)
    made = {}
    for name, clip in base_and_adapted(run, how.device):
        encoder = Encoder(clip, _in_bf16(run))
        found = encode_images(clip, pairs.images, features, encoder=encoder)
        made[name] = Features(found, encode_captions(clip, captions, encoder=encoder))
    return _retrieval_examples(pairs, made, missing)


def _classified(run: Run, how: ComputeOptions) -> Examples:
    images, prompts, missing = read_validation_classes(run)
    labels = torch.tensor(images.labels)
    features = _as_the_run(run, how)
    made: dict[str, Features] = {}
    results: dict[str, ClassificationResult] = {}
    predicted: list[int] = []
    head, names = _head(run)
    if names and names != images.classes:
        head = None
    for name, clip in base_and_adapted(run, how.device):
        encoder = Encoder(clip, _in_bf16(run))
        found = encode_images(clip, images.images, features, encoder=encoder)
        made[name] = Features(found, class_features(encoder, prompts))
        logits, sigmoid = prompt_logits(clip, found, made[name].texts), clip.logit_bias is not None
        if name == "adapted" and head is not None:
            with torch.no_grad():
                logits, sigmoid = head(found), False
        results[name] = classification_metrics(logits, labels, images.classes, sigmoid=sigmoid)
        predicted = logits.argmax(1).tolist()
    kind = str(run.params.get("head")) if head is not None else ""
    return _class_examples(images, made, results, predicted, missing, kind)


def _as_the_run(run: Run, how: ComputeOptions) -> FeatureArgs:
    return how.features.replace(exact_preprocess=run.params.get("exact_preprocess") is True)


def _head(run: Run) -> tuple[torch.nn.Module | None, tuple[str, ...]]:
    """Load the classification head that the run trained, with its classes; (None, ()) if it trained none."""
    folder = run.path / "head"
    return load_head(folder) if folder.is_dir() else (None, ())


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


def read_validation_classes(run: Run) -> tuple[Labelled, tuple[Sequence[str], ...], int]:
    """Read the validation images of a classification run as it split them.

    Returns them, the prompts of their classes, and the number of images that cannot be read.

    Raises:
        DataError: the run names none, or nothing of them is left.
    """
    params = run.params
    if params.get("val_data"):
        val, lost = _read_images(run, "val_data")
        if find_data(str(params.get("train_data")), run.path) is not None:
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
    return val, class_prompts(val.classes, given, templates), lost


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
    if key in ("split", "sheet", "query") and name == "val_data" and run.params.get("train_data"):
        return own
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
    found = find_data(str(recorded), run.path)
    if found is None:
        raise DataError(f"{run.path}: its data {recorded} are not there; run from where it was started")
    return found


@dataclass(frozen=True)
class Features:
    """Unit-norm features of one model: images (N, D), and texts (M, D) or classes (C, D)."""

    images: Tensor
    texts: Tensor


class ShownImages:
    """Image files that are shown, each once, by position."""

    def __init__(self, files: Sequence[object]) -> None:
        self._files = files
        self.shown: list[str] = []
        self._places: dict[int, int] = {}

    def __call__(self, image: int) -> int:
        """Return the position in `shown` of image number `image`."""
        if image not in self._places:
            self._places[image] = len(self.shown)
            self.shown.append(str(self._files[image]))
        return self._places[image]


def _retrieval_examples(pairs: Pairs, sides: Mapping[str, Features], missing: int) -> Examples:
    """Select queries and similarities of retrieval; `texts` are all captions in image order."""
    rows = pairs.rows()
    owner = torch.tensor([image for image, _ in rows])
    base, adapted = sides["base"], sides["adapted"]
    both = {name: retrieval_ranks(s.images, s.texts, owner) for name, s in sides.items()}
    ranks = {name: found.text_to_image for name, found in both.items()}
    kinds = _kinds(ranks["base"], ranks["adapted"])
    album = ShownImages([path.absolute() for path in pairs.images])
    chosen = [(kind, row) for kind, number in SHOWN.items() for row in _spread(kinds[kind], number, owner)]
    tops = {name: _tops(side, [row for _, row in chosen]) for name, side in sides.items()}
    queries = []
    for place, (kind, row) in enumerate(chosen):
        found = [
            Found(int(ranks[name][row]), tuple(map(album, tops[name][0][place])), tops[name][1][place])
            for name in ("base", "adapted")
        ]
        queries.append(Query(rows[row][1], album(rows[row][0]), kind, found[0], found[1]))
    heat = _caption_heat(pairs, sides, album)
    return Examples(
        task="retrieval",
        base=retrieval_metrics(base.images, base.texts, owner),
        adapted=retrieval_metrics(adapted.images, adapted.texts, owner),
        items=len(pairs),
        missing=missing,
        counts={kind: len(found) for kind, found in kinds.items()},
        images=tuple(album.shown),
        queries=tuple(queries),
        heat=heat,
        classes=None,
        errors=_errors(pairs, sides, both, owner) if len(pairs) > 1 else None,
    )


def _errors(
    pairs: Pairs, sides: Mapping[str, Features], ranks: Mapping[str, RetrievalRanks], owner: Tensor
) -> RetrievalErrors:
    """Find the worst captions of both models, and recall by length and word."""
    answers = {
        name: image_answers(side.images, side.texts, owner, ranks[name]) for name, side in sides.items()
    }
    return analyse_errors(pairs, answers)


def _kinds(base: Tensor, adapted: Tensor) -> dict[QueryKind, list[int]]:
    """Group captions by whether rank 1 was right before and after adaptation."""
    before, after = base == 1, adapted == 1
    split: dict[QueryKind, Tensor] = {
        "fixed": ~before & after,
        "broken": before & ~after,
        "both wrong": ~before & ~after,
        "both right": before & after,
    }
    return {kind: mask.nonzero()[:, 0].tolist() for kind, mask in split.items()}


def _spread(rows: Sequence[int], number: int, owner: Tensor | None = None) -> list[int]:
    """Pick `number` evenly spaced rows, so that they are neither the best nor the worst ones."""
    if owner is not None:
        first: dict[int, int] = {}
        for row in rows:
            first.setdefault(int(owner[row]), row)
        rows = list(first.values())
    if len(rows) <= number:
        return list(rows)
    return [rows[(2 * place + 1) * len(rows) // (2 * number)] for place in range(number)]


def _tops(side: Features, rows: Sequence[int]) -> tuple[list[list[int]], tuple[tuple[float, ...], ...]]:
    """Return image numbers and cosines of the first images for some captions."""
    if not rows:
        return [], ()
    scores, images = (side.texts[list(rows)] @ side.images.T).topk(min(TOP, len(side.images)))
    return images.tolist(), _rounded(scores)


def _caption_heat(pairs: Pairs, sides: Mapping[str, Features], album: ShownImages) -> Similarities:
    """Compare a dozen images, spread over the data, with the first caption of each; equal captions once."""
    starts = [0]
    for captions in pairs.captions:
        starts.append(starts[-1] + len(captions))
    distinct: dict[str, int] = {}
    for image, captions in enumerate(pairs.captions):
        distinct.setdefault(captions[0], image)
    chosen = _spread(list(distinct.values()), HEAT)
    texts = [starts[image] for image in chosen]
    captions = tuple(pairs.captions[image][0] for image in chosen)
    return _similarities(sides, chosen, texts, captions, album)


def _class_examples(
    data: Labelled,
    sides: Mapping[str, Features],
    results: Mapping[str, ClassificationResult],
    predicted: Sequence[int],
    missing: int,
    head: str,
) -> Examples:
    """Select confusions and similarities of classification; `texts` are the classes."""
    album = ShownImages([path.absolute() for path in data.images])
    confusions = {name: result.confusion.tolist() for name, result in results.items()}
    heat = _class_heat(data, sides, album)
    pairs = _pairs(data, confusions, predicted, album)
    return Examples(
        task="classification",
        base=results["base"].metrics,
        adapted=results["adapted"].metrics,
        items=len(data),
        missing=missing,
        counts={},
        images=tuple(album.shown),
        queries=(),
        heat=heat,
        classes=Classes(
            names=data.classes,
            base=tuple(map(tuple, confusions["base"])),
            adapted=tuple(map(tuple, confusions["adapted"])),
            pairs=pairs,
            head=head,
        ),
    )


def _pairs(
    data: Labelled, confusions: Mapping[str, list[list[int]]], predicted: Sequence[int], album: ShownImages
) -> tuple[Pair, ...]:
    """List the pairs of classes that the adapted model confuses most often."""
    counts = [
        (count, true, other)
        for true, row in enumerate(confusions["adapted"])
        for other, count in enumerate(row)
        if other != true and count
    ]
    pairs = []
    for count, true, other in sorted(counts, key=lambda item: (-item[0], item[1:]))[:PAIRS]:
        mistaken = [
            image
            for image, (label, taken) in enumerate(zip(data.labels, predicted, strict=True))
            if (label, taken) == (true, other)
        ]
        shown = tuple(map(album, mistaken[:PICTURES]))
        pairs.append(Pair(true, other, confusions["base"][true][other], count, shown))
    return tuple(pairs)


def _class_heat(data: Labelled, sides: Mapping[str, Features], album: ShownImages) -> Similarities:
    """Compare one image of each of a dozen classes with those classes."""
    first: dict[int, int] = {}
    for image, label in enumerate(data.labels):
        first.setdefault(label, image)
    labels = _spread(sorted(first), HEAT)
    images = [first[label] for label in labels]
    names = tuple(data.classes[label] for label in labels)
    return _similarities(sides, images, labels, names, album)


def _similarities(
    sides: Mapping[str, Features],
    images: Sequence[int],
    columns: Sequence[int],
    texts: tuple[str, ...],
    album: ShownImages,
) -> Similarities:
    """Compare images with the texts in some columns, of which each image has its own at its place."""
    base, adapted = (
        _rounded(side.images[list(images)] @ side.texts[list(columns)].T)
        for side in (sides["base"], sides["adapted"])
    )
    return Similarities(tuple(map(album, images)), texts, tuple(range(len(images))), base, adapted)


def _rounded(scores: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(round(value, 4) for value in row) for row in scores.tolist())
