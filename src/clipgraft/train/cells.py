"""The record of one cell of a grid of runs: what it left, and the settings that it was run with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeVar

from clipgraft.errors import CheckpointError
from clipgraft.files import write_json
from clipgraft.records import read_json

CELL_FILE = "cell.json"


class FinishedCell(Protocol):
    """What `cell.json` holds: settings, and a result of the grid's own kind."""

    @property
    def settings(self) -> dict[str, Any]:
        """What the cell was run with."""


_Finished = TypeVar("_Finished", bound=FinishedCell)


def read_finished(
    folder: Path, kind: type[_Finished], settings: Mapping[str, Any], another: str
) -> _Finished | None:
    """Read the record of a cell that has been finished; None if it has not.

    Args:
        folder: of the cell.
        kind: the dataclass that the record is.
        settings: what it must have been run with; more may be recorded.
        another: what to choose for other settings, in a message.

    Raises:
        CheckpointError: it was run with other settings, or its record is damaged.
    """
    path = folder / CELL_FILE
    if not path.is_file():
        return None
    record = read_json(path, kind, CheckpointError, "remove it to run the cell again")
    changed = [key for key in settings if record.settings.get(key) != settings[key]]
    if changed:
        raise CheckpointError(
            f"{folder} was run with another {', '.join(sorted(changed)[:4])}: use the same settings, or "
            f"{another}"
        )
    return record


def write_finished(folder: Path, result: Any, settings: Mapping[str, Any]) -> None:
    """Record the result of a finished cell, a dataclass; from here on it is never run again."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CELL_FILE, {"settings": dict(settings), "result": asdict(result)})
