"""What a run forgot of other data: measured once, and kept in its folder."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from clipgraft.errors import DataError
from clipgraft.records import Finite, Whole, checked
from clipgraft.report.examples import keep, key_of, read_stored
from clipgraft.report.runs import METRICS, Run, TaskName

log = logging.getLogger("clipgraft")
FORGOTTEN_FILE = Path("results") / "forgotten.json"


@dataclass(frozen=True)
class Retained:
    """Other data, to see what a run forgot of them.

    Attributes:
        path: a table of images and captions, or for classification a folder or table of labelled images.
        task: how they are measured.
        keys: of `read_pairs` or `read_labelled`: `image_key`, `caption_key` or `label_key`, `separator`.
        prompts: YAML of prompts of their classes.
        templates: for classes without prompts.
    """

    path: Path
    task: TaskName
    keys: Mapping[str, str | None]
    prompts: Path | None = None
    templates: str = "photo"


@dataclass(frozen=True)
class Forgotten:
    """Metrics of both models on retained data, and how many images those are."""

    task: TaskName
    base: Mapping[str, Finite]
    adapted: Mapping[str, Finite]
    items: Whole


def stored_forgotten(run: Run, retained: Retained) -> Forgotten | None:
    """What a run's folder knows of these data, if run and data are as they were."""
    record = read_stored(run.path / FORGOTTEN_FILE, _key(run, retained))
    if record is None:
        return None
    try:
        found = checked({**record, "task": retained.task}, Forgotten, str(run.path / FORGOTTEN_FILE))
    except DataError as error:
        log.info("%s: it is measured again", error)
        return None
    whole = all(name in side for name in METRICS[found.task] for side in (found.base, found.adapted))
    return found if whole else None


def store_forgotten(run: Run, retained: Retained, found: Forgotten) -> None:
    """Keep it in the run's folder."""
    keep(run.path / FORGOTTEN_FILE, _key(run, retained), asdict(found))


def _key(run: Run, retained: Retained) -> str:
    files = key_of(run, retained.path, retained.prompts)
    how = (str(retained.path.resolve()), retained.task, sorted(retained.keys.items()), retained.templates)
    return hashlib.sha256(f"{files} {how}".encode(errors="surrogatepass")).hexdigest()[:32]
