"""`events.jsonl`: one line of JSON for everything a run measured, read by a resumed run and by reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clipgraft.errors import CheckpointError
from clipgraft.records import Finite, Whole, checked, parse_json, shown

EVENTS = "events.jsonl"
MEASURED = ("train", "val")  # kinds whose every other value is a number


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a run, each with `kind` and `step`; none where there is no such file.

    Raises:
        CheckpointError: a line is damaged.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    # What follows the last line break is empty, or a line that is being written, or that a kill cut short.
    return [_event(line, f"{path}, line {number}") for number, line in enumerate(lines[:-1], start=1)]


def _event(line: str, where: str) -> dict[str, Any]:
    advice = "delete that line"
    event = parse_json(line, dict[str, Any], where, CheckpointError, advice)
    checked(event.get("step"), Whole, f"{where}: step", CheckpointError, advice)
    kind = event.get("kind")
    if not isinstance(kind, str):
        raise CheckpointError(f"{where}: kind is {shown(kind)}, and should be text; {advice}")
    if kind in MEASURED:
        checked({**event, "kind": 0}, dict[str, Finite], where, CheckpointError, advice)
    if kind == "train" and "loss" not in event:
        raise CheckpointError(f"{where}: loss is missing; {advice}")
    return event
