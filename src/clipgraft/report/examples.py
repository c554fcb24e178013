"""Examples of what a run changed: chosen once, with the model, and kept in the run's folder."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from clipgraft.adapters.runs import find_path
from clipgraft.errors import WriteError
from clipgraft.files import write_json
from clipgraft.report.runs import Run, TaskName

log = logging.getLogger("clipgraft")
FORMAT = 1
EXAMPLES_FILE = Path("results") / "examples.json"
QueryKind = Literal["fixed", "broken", "both right", "both wrong"]


@dataclass(frozen=True)
class Found:
    """What one model found for a caption: the 1-based rank of the true image, and the first images.

    `images` are positions in `Examples.images`, best first; `scores` their cosines.
    """

    rank: int
    images: tuple[int, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True)
class Query:
    """A caption, its true image (a position in `Examples.images`), and what both models found."""

    caption: str
    image: int
    kind: QueryKind
    base: Found
    adapted: Found


@dataclass(frozen=True)
class Heat:
    """Cosines of some images (rows) with some texts (columns) under both models.

    `truth` is the column that belongs to each row.
    """

    images: tuple[int, ...]
    texts: tuple[str, ...]
    truth: tuple[int, ...]
    base: tuple[tuple[float, ...], ...]
    adapted: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Pair:
    """Images of one class that the adapted model takes for another: how many, and a few of them."""

    true: int
    taken_for: int
    base: int
    adapted: int
    images: tuple[int, ...]


@dataclass(frozen=True)
class Classes:
    """A classifier before and after: counts of (true, predicted), and what is still confused."""

    names: tuple[str, ...]
    base: tuple[tuple[int, ...], ...]
    adapted: tuple[tuple[int, ...], ...]
    pairs: tuple[Pair, ...]
    head: str = ""


@dataclass(frozen=True)
class Examples:
    """All examples of a run.

    Attributes:
        task: what they are of.
        base, adapted: metrics of both models on all validation data.
        items: number of validation images.
        missing: images that the data name and that could not be read.
        counts: number of captions by kind of query; empty for classification.
        images: files that are shown.
        queries: for retrieval.
        heat: similarities of a few images and texts.
        classes: for classification.
    """

    task: TaskName
    base: Mapping[str, float]
    adapted: Mapping[str, float]
    items: int
    missing: int
    counts: Mapping[str, int]
    images: tuple[str, ...]
    queries: tuple[Query, ...]
    heat: Heat
    classes: Classes | None


def stored_examples(run: Run) -> Examples | None:
    """The examples that a run's folder holds, if they are of what the run and its data are now."""
    path = run.path / EXAMPLES_FILE
    record = read_stored(path, _key(run))
    if record is None:
        return None
    try:
        return _from_json(record["examples"])
    except (KeyError, TypeError, ValueError):
        log.info("%s is of another version: made again", path)
        return None


def store_examples(run: Run, examples: Examples) -> None:
    """Keep examples in the run's folder; one that cannot be written to only costs time later."""
    keep(run.path / EXAMPLES_FILE, _key(run), {"examples": asdict(examples)})


def _key(run: Run) -> str:
    recorded = (run.params.get(name) for name in ("val_data", "train_data", "prompts"))
    return key_of(run, *(find_path(str(path), run.path) for path in recorded if path))


def read_stored(path: Path, key: str) -> dict[str, Any] | None:
    """A JSON record made for a key; None if it is not there, of another key, or damaged."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.info("%s is damaged (%s): made again", path, type(error).__name__)
        return None
    fits = isinstance(record, dict) and record.get("key") == key and record.get("format") == FORMAT
    return record if fits else None


def keep(path: Path, key: str, values: Mapping[str, Any]) -> None:
    """Write a JSON record for a key; says so where that is not possible."""
    try:
        write_json(path, {"format": FORMAT, "key": key, **values})
    except WriteError as error:
        log.info("%s: it is made again for the next report", error.what)


def key_of(run: Run, *data: Path | None) -> str:
    """What examples depend on: the trained weights, the data that are named, and how they are read."""
    digest = hashlib.sha256(str(FORMAT).encode())
    names = [
        *(
            "task",
            "model",
            "pretrained",
            "val_size",
            "seed",
            "templates",
            "exact_preprocess",
            "autocast",
            "head",
        ),
        *("csv_img_key", "csv_caption_key", "csv_label_key", "csv_separator", "dataset_type"),
    ]
    digest.update(repr([(name, run.params.get(name)) for name in names]).encode())
    for path in (run.saved, run.path / "head"):
        digest.update(repr(_state(path)).encode(errors="surrogatepass"))
    for path in data:
        place = None if path is None else str(path.resolve())
        digest.update(repr((place, _state(path))).encode(errors="surrogatepass"))
    return digest.hexdigest()[:32]


def _state(path: Path | None) -> list[tuple[str, int, int]]:
    """Names, sizes and times of a file, or of all files below a folder."""
    if path is None or not path.exists():
        return []
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    states = ((file, file.stat()) for file in files)
    return [(file.relative_to(path).as_posix(), s.st_size, s.st_mtime_ns) for file, s in states]


def _from_json(values: Mapping[str, Any]) -> Examples:
    classes = values["classes"]
    return Examples(
        **{
            **values,
            "images": tuple(values["images"]),
            "queries": tuple(
                Query(**{**query, "base": _found(query["base"]), "adapted": _found(query["adapted"])})
                for query in values["queries"]
            ),
            "heat": Heat(**{name: _tuples(value) for name, value in values["heat"].items()}),
            "classes": None
            if classes is None
            else Classes(
                names=tuple(classes["names"]),
                base=_tuples(classes["base"]),
                adapted=_tuples(classes["adapted"]),
                pairs=tuple(Pair(**{**pair, "images": tuple(pair["images"])}) for pair in classes["pairs"]),
                head=classes["head"],
            ),
        }
    )


def _found(values: Mapping[str, Any]) -> Found:
    return Found(int(values["rank"]), tuple(values["images"]), tuple(values["scores"]))


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
