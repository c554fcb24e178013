"""Run folders as models: what a run saved last, an adapter or all weights, and the base it began with."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from clipgraft.adapters.folder import is_adapter
from clipgraft.errors import CheckpointError
from clipgraft.files import path_exists
from clipgraft.models.clip import Source
from clipgraft.models.configs import CONFIG_FILE
from clipgraft.records import read_json

T = TypeVar("T")
PARAMS, RESULTS, HEAD = "params.json", "results.json", "head"
_RECORDS = (PARAMS, "params.txt", "events.jsonl")
_EPOCH = re.compile(r"epoch_([0-9]{1,9})(\.pt)?")


@dataclass(frozen=True)
class RunModel:
    """The model in a run folder.

    Attributes:
        run: the folder.
        saved: an adapter folder, a transformers folder, or an open_clip checkpoint.
        kind: what `saved` is: an adapter, all weights after fine-tuning, or those of a distilled student.
        base: what the run began with; without a name where it recorded none.
        unfinished: the epoch that `saved` is of, where the run has not come to its end; else None.
    """

    run: Path
    saved: Path
    kind: Literal["adapter", "fine-tuned", "distilled"]
    base: Source
    unfinished: int | None = None

    @property
    def head(self) -> Path | None:
        """The folder of the classifier that was trained with the model, if there is one."""
        return self.run / HEAD if (self.run / HEAD).is_dir() else None

    @property
    def weights(self) -> Source:
        """What `models.load.load` takes for a whole model: a folder, or a name with the checkpoint.

        Raises CheckpointError where the run did not record the name.
        """
        if self.saved.is_dir():
            return Source(str(self.saved))
        if self.base.name:
            return Source(self.base.name, str(self.saved))
        raise CheckpointError(
            f"{self.run} does not record its base: name that, and give {self.saved} as `pretrained`"
        )


def is_run(path: Path) -> bool:
    """Whether a folder is that of a run: clipgraft's, or open_clip's, which is laid out alike."""
    return any((path / name).is_file() for name in _RECORDS) and not is_model_folder(path)


def is_model_folder(path: Path) -> bool:
    """Whether a folder is a whole model of transformers or open_clip."""
    return (path / "config.json").is_file() or (path / CONFIG_FILE).is_file()


def find_run_model(path: str | Path) -> RunModel | None:
    """The model of a run, of a sweep's cell, or of one checkpoint in a run; None if `path` is none of these.

    Raises:
        CheckpointError: the run has saved nothing yet, or its records are damaged.
    """
    path = Path(path)
    if path.parent.name == "checkpoints" and is_run(path.parent.parent) and _EPOCH.fullmatch(path.name):
        return _described(path.parent.parent, path) if path.exists() else None
    run = path / "run" if is_run(path / "run") else path
    if not is_run(run):
        return None
    saved, epoch = _saved(run)
    return _described(run, saved, epoch)


def runs_near(folder: Path) -> list[Path]:
    """The runs, and sweeps' cells that trained, directly in a folder."""
    if not folder.is_dir():
        return []
    places = [*folder.iterdir(), *folder.glob("cells/*")]
    return sorted(place for place in places if is_run(place) or is_run(place / "run"))


def read_params(run: Path) -> dict[str, Any]:
    """What a run recorded in params.json; of runs that have none, the lines of params.txt.

    Raises:
        CheckpointError: the file is damaged.
    """
    params = read_record(run / PARAMS, dict[str, Any])
    if params is not None or not (run / "params.txt").is_file():
        return params or {}
    lines = (run / "params.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    return {name: _value(text) for name, colon, text in (line.partition(": ") for line in lines) if colon}


def read_record(path: Path, kind: type[T]) -> T | None:
    """Read one of a run's JSON records; None if there is no such file.

    Raises:
        CheckpointError: the file is damaged.
    """
    if not path.is_file():
        return None
    return read_json(path, kind, CheckpointError, "restore it, or leave its run out")


def find_path(recorded: str, run: Path) -> Path | None:
    """A path as a run recorded it: from here, or from a folder above the run, where it was started."""
    places = [Path(recorded), *(above / recorded for above in run.resolve().parents)]
    return next(filter(path_exists, places), None)


def _described(run: Path, saved: Path, epoch: int | None = None) -> RunModel:
    params = read_params(run)
    if is_adapter(saved):
        return RunModel(run, saved, "adapter", _base(params, run), epoch)
    kind: Literal["distilled", "fine-tuned"] = "distilled" if params.get("teacher") else "fine-tuned"
    return RunModel(run, saved, kind, _base(params, run), epoch)


def _saved(run: Path) -> tuple[Path, int | None]:
    """What a run saved, and the epoch of it if the run has not come to its end.

    Only names are taken from its records: a run that was moved, or comes from elsewhere, leads to no other
    folder.
    """
    if is_adapter(run / "adapter"):
        return run / "adapter", None
    folder = run / "checkpoints"
    results = read_record(run / RESULTS, dict[str, Any])
    if results is not None:
        last = folder / Path(str(results.get("saved"))).name
        if last.exists() and last.name:
            return last, None
    kept: dict[int, Path] = {}
    for place in sorted(folder.glob("epoch_*")):
        if match := _EPOCH.fullmatch(place.name):
            kept.setdefault(int(match[1]), place)  # an adapter sorts before the whole model beside it
    if not kept:
        raise CheckpointError(f"{run} has saved no model yet: finish the run with `resume='latest'`")
    epoch = max(kept)
    return kept[epoch], epoch


def _base(params: Mapping[str, Any], run: Path) -> Source:
    """What the run began with: as it was found from everywhere, or as it was named on the command line."""
    source = params.get("source")
    if isinstance(source, Mapping) and source.get("name"):
        return Source(str(source["name"]), str(source.get("pretrained") or ""))
    name, tag = str(params.get("model") or ""), str(params.get("pretrained") or "")
    return Source(_found(name, run), _found(tag, run))


def _found(name: str, run: Path) -> str:
    prefix = "hf:" if name.startswith("hf:") else ""
    place = find_path(name.removeprefix(prefix), run) if name not in ("", "hf:", "emoji", "none") else None
    return name if place is None else f"{prefix}{place}"


def _value(text: str) -> Any:
    """A number, flag or None as it was; all else as text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
