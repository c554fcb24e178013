"""Examples and retention of a run, computed once with its model and kept as JSON in its folder."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from clipgraft.adapters.run_folder import find_path
from clipgraft.data.addresses import as_address
from clipgraft.data.webdataset import find_tars, is_tar_pattern
from clipgraft.errors import DataError, WriteError
from clipgraft.evaluate.error_analysis import RetrievalErrors
from clipgraft.evaluate.metrics import HEADLINE, TaskName
from clipgraft.files import write_json
from clipgraft.records import Finite, Whole, checked, read_json
from clipgraft.report.runs import Run

log = logging.getLogger("clipgraft")
FORMAT = 2
EXAMPLES_FILE = Path("results") / "examples.json"
MODELS = ("base", "adapted")
QueryKind = Literal["fixed", "broken", "both right", "both wrong"]


@dataclass(frozen=True)
class Found:
    """What one model retrieved for a caption: the 1-based rank of the true image, and the first images.

    `images` are positions in `Examples.images`, best first; `scores` their cosines.
    """

    rank: Whole
    images: tuple[Whole, ...]
    scores: tuple[Finite, ...]


@dataclass(frozen=True)
class Query:
    """A caption, its true image (a position in `Examples.images`), and what both models found."""

    caption: str
    image: Whole
    kind: QueryKind
    base: Found
    adapted: Found


@dataclass(frozen=True)
class Similarities:
    """Cosines of some images (rows) with some texts (columns) under both models.

    `truth` is the column that belongs to each row.
    """

    images: tuple[Whole, ...]
    texts: tuple[str, ...]
    truth: tuple[Whole, ...]
    base: tuple[tuple[Finite, ...], ...]
    adapted: tuple[tuple[Finite, ...], ...]


@dataclass(frozen=True)
class Pair:
    """Images of one class that the adapted model takes for another: how many, and a few of them."""

    true: Whole
    taken_for: Whole
    base: Whole
    adapted: Whole
    images: tuple[Whole, ...]


@dataclass(frozen=True)
class Classes:
    """Confusion counts of (true, predicted) before and after, and the pairs that are still confused."""

    names: tuple[str, ...]
    base: tuple[tuple[Whole, ...], ...]
    adapted: tuple[tuple[Whole, ...], ...]
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
        errors: for retrieval among two images or more.
    """

    task: TaskName
    base: Mapping[str, Finite]
    adapted: Mapping[str, Finite]
    items: Whole
    missing: Whole
    counts: Mapping[str, Whole]
    images: tuple[str, ...]
    queries: tuple[Query, ...]
    heat: Similarities
    classes: Classes | None
    errors: RetrievalErrors | None = None


def stored_examples(run: Run) -> Examples | None:
    """Read the examples kept in a run's folder; None if run or data have changed since."""
    path = run.path / EXAMPLES_FILE
    record = read_stored(path, _key(run))
    if record is None:
        return None
    try:
        found = checked(record.get("examples"), Examples, str(path))
        return found if _fit(found) else None
    except DataError as error:
        log.info("%s: it is made again", error)
        return None


def _fit(found: Examples) -> bool:
    """Check that indices are in range and that tables have matching sizes."""
    images = range(len(found.images))
    models = [model for query in found.queries for model in (query.base, query.adapted)]
    pairs = found.classes.pairs if found.classes else ()
    named = [place for model in models for place in model.images]
    named += [*found.heat.images, *(place for pair in pairs for place in pair.images)]
    if not all(place in images for place in (*named, *(query.image for query in found.queries))):
        return False
    if any(len(model.images) != len(model.scores) for model in models):
        return False
    if found.task == "retrieval" and not found.counts.keys() >= set(get_args(QueryKind)):
        return False
    if any(name not in side for name in HEADLINE[found.task] for side in (found.base, found.adapted)):
        return False
    if found.errors is not None and not _of_both(found.errors):
        return False
    heat, texts = found.heat, len(found.heat.texts)
    square = all(_is_table(side, len(heat.images), texts) for side in (heat.base, heat.adapted))
    if not square or len(heat.truth) != len(heat.images) or not all(t in range(texts) for t in heat.truth):
        return False
    if found.classes is None:
        return True
    count = len(found.classes.names)
    return (
        count > 0
        and all(_is_table(side, count, count) for side in (found.classes.base, found.classes.adapted))
        and all(place in range(count) for pair in pairs for place in (pair.true, pair.taken_for))
    )


def _of_both(errors: RetrievalErrors) -> bool:
    """Check that everything is known of both models, and that no group is empty."""
    asked = (each for part in (errors.worst, errors.better, errors.worse) for each in part.listed)
    groups = [*errors.by_length.groups, *errors.by_word.groups]
    known = [errors.first, *(group.first for group in groups), *(each.answers for each in asked)]
    return all(each.keys() == set(MODELS) for each in known) and all(group.captions for group in groups)


def _is_table(values: Sequence[Sequence[object]], rows: int, columns: int) -> bool:
    return len(values) == rows and all(len(row) == columns for row in values)


def store_examples(run: Run, examples: Examples) -> None:
    """Keep examples in the run's folder; where that fails, they are computed again next time."""
    keep(run.path / EXAMPLES_FILE, _key(run), {"examples": asdict(examples)})


def _key(run: Run) -> str:
    recorded = (run.params.get(name) for name in ("val_data", "train_data", "prompts"))
    return key_of(run, *(find_data(str(path), run.path) for path in recorded if path))


def find_data(recorded: str, run: Path) -> Path | None:
    """The data of a run, as `find_path` finds files; also a pattern of tar files, or an address."""
    found = find_path(recorded, run)
    if found is not None:
        return found
    if not is_tar_pattern(Path(recorded)):
        return Path(recorded) if as_address(Path(recorded)) else None
    for place in (Path(recorded), *(above / recorded for above in run.resolve().parents)):
        with contextlib.suppress(DataError):
            find_tars(place)
            return place
    return None


def read_stored(path: Path, key: str) -> dict[str, Any] | None:
    """Read a JSON record made for a key; None if it is missing, damaged or of another key."""
    if not path.is_file():
        return None
    try:
        record = read_json(path, dict[str, Any])
    except DataError as error:
        log.info("%s: it is made again", error)
        return None
    return record if record.get("key") == key and record.get("format") == FORMAT else None


def keep(path: Path, key: str, values: Mapping[str, Any]) -> None:
    """Write a JSON record for a key; logs a line where that is not possible."""
    try:
        write_json(path, {"format": FORMAT, "key": key, **values})
    except WriteError as error:
        log.info("%s: it is made again for the next report", error.what)


def key_of(run: Run, *data: Path | None) -> str:
    """Hash what examples depend on: the trained weights, the named data, and how they are read."""
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
        *("split", "sheet", "query", "val_split", "val_sheet", "val_query"),
        *("csv_encoding", "csv_quoting", "image_root", "keep_nulls"),
        *("val_csv_img_key", "val_csv_caption_key", "val_csv_label_key", "val_csv_separator"),
        *("val_csv_encoding", "val_csv_quoting", "val_image_root"),
    ]
    digest.update(repr([(name, run.params.get(name)) for name in names]).encode())
    for path in (run.saved, run.path / "head"):
        digest.update(repr(_state(path)).encode(errors="surrogatepass"))
    for path in data:
        place = None if path is None else str(path.resolve())
        digest.update(repr((place, _state(path))).encode(errors="surrogatepass"))
    return digest.hexdigest()[:32]


def _state(path: Path | None) -> list[tuple[str, int, int]]:
    """List names, sizes and modification times of a file, or of all files below a folder."""
    if path is None:
        return []
    if not path.exists():
        tars = find_tars(path) if is_tar_pattern(path) else []
        return [state for tar in tars for state in _state(tar)]
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    states = ((file, file.stat()) for file in files)
    return [(file.relative_to(path).as_posix(), s.st_size, s.st_mtime_ns) for file, s in states]


RETENTION_FILE = Path("results") / "forgotten.json"


@dataclass(frozen=True)
class RetainedData:
    """Data that a run was not trained on, to measure what it forgot.

    Attributes:
        path: a table of images and captions, or for classification a folder or table of labelled images.
        task: how they are measured.
        keys: fields of `TableArgs` or `LabelArgs` that are given.
        prompts: YAML of prompts of their classes.
        templates: for classes without prompts.
    """

    path: Path
    task: TaskName
    keys: Mapping[str, str | None]
    prompts: Path | None = None
    templates: str = "photo"


@dataclass(frozen=True)
class Retention:
    """Metrics of base and adapted model on retained data, and the number of images."""

    task: TaskName
    base: Mapping[str, Finite]
    adapted: Mapping[str, Finite]
    items: Whole


def stored_retention(run: Run, retained: RetainedData) -> Retention | None:
    """Read the retention kept in a run's folder; None if run or data have changed since."""
    record = read_stored(run.path / RETENTION_FILE, _retention_key(run, retained))
    if record is None:
        return None
    try:
        found = checked({**record, "task": retained.task}, Retention, str(run.path / RETENTION_FILE))
    except DataError as error:
        log.info("%s: it is measured again", error)
        return None
    whole = all(name in side for name in HEADLINE[found.task] for side in (found.base, found.adapted))
    return found if whole else None


def store_retention(run: Run, retained: RetainedData, found: Retention) -> None:
    """Keep the retention in the run's folder."""
    keep(run.path / RETENTION_FILE, _retention_key(run, retained), asdict(found))


def _retention_key(run: Run, retained: RetainedData) -> str:
    files = key_of(run, retained.path, retained.prompts)
    how = (str(retained.path.resolve()), retained.task, sorted(retained.keys.items()), retained.templates)
    return hashlib.sha256(f"{files} {how}".encode(errors="surrogatepass")).hexdigest()[:32]
