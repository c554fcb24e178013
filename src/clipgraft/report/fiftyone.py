"""Answers of models for every image, in files that FiftyOne imports (FiftyOneImageClassificationDataset).

`data.json` names the images, `labels.json` what is right, and `MODEL.json` what each model answered, with its
confidence and the attributes `error`, `rank` or `right`. Image files stay where they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipgraft.data.datasets import Labelled, Pairs
from clipgraft.errors import ConfigError
from clipgraft.evaluate.answers import CaptionAnswers
from clipgraft.evaluate.classification import ClassificationResult
from clipgraft.files import atomic_folder, write_json
from clipgraft.ours import MARK, mark_folder, refuse_foreign

RECORD = "clipgraft_fiftyone.json"
_TRUTH, _DATA = "labels", "data"


@dataclass(frozen=True)
class Answers:
    """What is right for N images, and what each model answered.

    Attributes:
        images: N files.
        classes: the names that may be answered; none for captions.
        truth: the right label of each image.
        models: by model, N labels as FiftyOne takes them: `label`, `confidence` and `attributes`.
    """

    images: Sequence[Path]
    classes: Sequence[str]
    truth: Sequence[str]
    models: Mapping[str, Sequence[Mapping[str, Any]]]


def classification_answers(data: Labelled, results: Mapping[str, ClassificationResult]) -> Answers:
    """Take the class that each model gave to each image; `confidence` is its probability."""
    truth = [data.classes[label] for label in data.labels]
    models = {}
    for name, result in results.items():
        found = zip(
            result.predicted.tolist(), result.confidence.tolist(), result.correct.tolist(), strict=True
        )
        models[name] = [
            _label(data.classes[predicted], confidence, not correct, right=right)
            for (predicted, confidence, correct), right in zip(found, truth, strict=True)
        ]
    return Answers(data.images, data.classes, truth, models)


def retrieval_answers(data: Pairs, results: Mapping[str, CaptionAnswers]) -> Answers:
    """Take the caption that each model found nearest to each image; `confidence` is their cosine.

    For an image whose own caption is not first it is the nearest wrong one, with the `rank` of the best own.
    """
    captions = [caption for group in data.captions for caption in group]
    models = {}
    for name, found in results.items():
        rows = zip(found.nearest.tolist(), found.score.tolist(), found.rank.tolist(), strict=True)
        models[name] = [
            _label(captions[nearest], score, rank != 1, rank=rank) for nearest, score, rank in rows
        ]
    return Answers(data.images, (), [" / ".join(group) for group in data.captions], models)


def _label(label: str, confidence: float, error: bool, **attributes: Any) -> dict[str, Any]:
    return {"label": label, "confidence": confidence, "attributes": {"error": error, **attributes}}


def made_here(folder: Path) -> bool:
    """Whether a folder bears the record of such an export."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and record.get("made_by") == MARK


def check_folder(folder: Path, overwrite: bool = False) -> None:
    """Raise ConfigError where something is that is no such export and may not be replaced."""
    refuse_foreign(folder, overwrite, ConfigError, "`fiftyone`", made_here)


def write_fiftyone(folder: str | Path, answers: Answers, *, overwrite: bool = False) -> Path:
    """Write the files of an export, in the place of an older one.

    Raises:
        ConfigError: something else is there.
        WriteError: there is no room, or the place does not let itself be written to.
    """
    folder = Path(folder)
    check_folder(folder, overwrite)
    keys = [f"{number:08d}" for number in range(len(answers.images))]
    classes = {"classes": list(answers.classes)} if answers.classes else {}
    with atomic_folder(folder) as temporary:
        images = (str(path.absolute()) for path in answers.images)
        write_json(temporary / f"{_DATA}.json", dict(zip(keys, images, strict=True)))
        truth = [{"label": label} for label in answers.truth]
        for name, labels in {_TRUTH: truth, **answers.models}.items():
            labelled = dict(zip(keys, labels, strict=True))
            write_json(temporary / f"{name}.json", {**classes, "labels": labelled})
        mark_folder(temporary, RECORD, images=len(keys), models=list(answers.models))
    return folder
