"""Records of our own on disk: read into checked dataclasses, or refused in one line that names the field."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from clipgraft.errors import CheckpointError, DataError
from clipgraft.records import Finite, Flag, Whole, checked, parse_json, read_json, read_pt, shown


@dataclass(frozen=True)
class Part:
    rows: Whole
    files: Mapping[str, tuple[Whole, str]]
    loss: Finite = 0.5
    final: Flag = False


@dataclass(frozen=True)
class Record:
    kind: Literal["images", "texts"]
    name: str
    parts: tuple[Part, ...]
    dim: Whole | None = None
    extra: Any = None


GOOD: dict[str, Any] = {
    "kind": "images",
    "name": "mèo \udcff",
    "parts": [{"rows": 3, "files": {"a/b.npy": [1, "x"]}, "loss": 1}],
    "dim": None,
}


def told(value: Any) -> str:
    with pytest.raises(DataError) as caught:
        checked(value, Record, "m.json", advice="encode again")
    message = str(caught.value)
    assert message.isprintable()
    assert message.startswith("m.json: ")
    assert message.endswith("; encode again")
    return message.removeprefix("m.json: ").removesuffix("; encode again")


def test_a_record_becomes_its_dataclass(tmp_path: Path) -> None:
    """A file of ours that is refused or read otherwise costs the user all that it describes."""
    path = tmp_path / "m.json"
    path.write_text(json.dumps(GOOD), encoding="utf-8")
    part = Part(3, {"a/b.npy": (1, "x")}, 1.0)
    assert read_json(path, Record) == Record("images", "mèo \udcff", (part,))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"kind": 5}, "kind is 5, and should be 'images' or 'texts'"),
        ({"name": 5}, "name is 5, and should be text"),
        ({"name": None}, "name is None, and should be text"),
        ({"dim": "x"}, "dim is 'x', and should be a whole number"),
        ({"dim": "3"}, "dim is '3', and should be a whole number"),
        ({"dim": True}, "dim is True, and should be a whole number"),
        ({"dim": 3.0}, "dim is 3.0, and should be a whole number"),
        ({"dim": -1}, "dim is -1, and should be greater than or equal to 0"),
        ({"dim": 2**63}, "dim is 9223372036854775808, and should be less than 9223372036854775808"),
        ({"dim": 10**5000}, "dim is a whole number of more than 64 bits"),
        ({"extra": {"a\x1b": [float("nan")]}}, "extra['a\\x1b'][0] is nan, which no record holds"),
        ({"extra": [-(10**400)]}, "extra[0] is a whole number of more than 64 bits"),
        ({"parts": "abc"}, "parts is 'abc', and should be a list"),
        ({"parts": {"a": 1}}, "parts is an object, and should be a list"),
        ({"parts": [5]}, "parts[0] is 5, and should be an object"),
        ({"parts": [{"rows": 1}]}, "parts[0].files is missing"),
        ({"parts": [{"files": {}}, {}]}, "parts[0].rows is missing (and 2 more)"),
        ({"parts": [{"rows": 1, "files": []}]}, "parts[0].files is a list, and should be an object"),
        (
            {"parts": [{"rows": 1, "files": {"../a": ["1", "x"]}}]},
            "parts[0].files['../a'][0] is '1', and should be a whole number",
        ),
        (
            {"parts": [{"rows": 1, "files": {}, "loss": float("inf")}]},
            "parts[0].loss is inf, which no record holds",
        ),
        (
            {"parts": [{"rows": 1, "files": {}, "loss": "0.5"}]},
            "parts[0].loss is '0.5', and should be a number",
        ),
        (
            {"parts": [{"rows": 1, "files": {}, "final": "yes"}]},
            "parts[0].final is 'yes', and should be true or false",
        ),
    ],
)
def test_a_wrong_value_is_named_with_its_field(change: dict[str, Any], fault: str) -> None:
    """A value of another type that gets through ends in a traceback far from the file that holds it."""
    assert told({**GOOD, **change}) == fault


@pytest.mark.parametrize("whole", [None, 5, "x", [], [1]])
def test_what_is_no_object_is_refused(whole: Any) -> None:
    """A list or a number where an object belongs reached `.items()` and raised AttributeError."""
    assert told(whole).startswith("the whole is ")


def test_nesting_without_end_is_refused() -> None:
    """Deep JSON raises RecursionError in whatever walks it first."""
    assert told({**GOOD, "extra": json.loads("[" * 80 + "]" * 80)}) == "is nested more than 64 levels deep"
    with pytest.raises(DataError, match="nested more than 64 levels"):
        parse_json("[" * 100_000, Record, "m.json")
    circle: list[Any] = []
    circle.append(circle)
    assert told({**GOOD, "extra": circle}) == "is nested more than 64 levels deep"


def test_a_few_bytes_that_stand_for_millions_of_values_are_refused() -> None:
    """A list of a list of a list, each named ten times over, is walked for hours."""
    bomb: list[Any] = []
    for _ in range(20):
        bomb = [bomb] * 10
    assert told({**GOOD, "extra": bomb}) == "has more than 5,000,000 values"


@pytest.mark.parametrize("text", ["", "{", '{"a": 1' + "1" * 5000 + "}", "nul", b"\xff\xfe\x00"])
def test_what_is_no_json_is_refused(text: str | bytes, tmp_path: Path) -> None:
    """A file that was cut short ends in json's own traceback, which does not name it."""
    path = tmp_path / "m.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=r"m\.json: is not JSON \([^\n]+\); train again"):
        read_json(path, Record, CheckpointError, "train again")


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    """A folder or a missing file in the place of a record is an OSError without its name."""
    (tmp_path / "m.json").mkdir()
    with pytest.raises(DataError, match=r"m\.json: is no file; write it again"):
        read_json(tmp_path / "m.json", Record)
    with pytest.raises(DataError, match=r"n\.json: cannot be read \(No such file or directory\)"):
        read_json(tmp_path / "n.json", Record)


class Evil:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('ran')",)


def test_pickles_run_nothing(tmp_path: Path) -> None:
    """A checkpoint from elsewhere that runs its code owns the machine."""
    path = tmp_path / "a.pt"
    torch.save({"name": Evil()}, path)
    with pytest.raises(CheckpointError, match=r"a\.pt: cannot be read: it holds pickled code or objects"):
        read_pt(path, dict)
    path.write_bytes(pickle.dumps({"name": Evil()}))
    with pytest.raises(CheckpointError, match=r"a\.pt: cannot be read: "):
        read_pt(path, dict)


def test_checkpoints_are_checked_like_json(tmp_path: Path) -> None:
    """A `.pt` file whose values have other types ends in a traceback deep inside torch."""
    path = tmp_path / "a.pt"
    torch.save(GOOD, path)
    for verify in (False, True):
        assert read_pt(path, Record, verify=verify).parts[0].rows == 3
    torch.save({**GOOD, "dim": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match=r"a\.pt: dim is a Tensor, and should be a whole number; save"):
        read_pt(path, Record)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"a\.pt: cannot be read: it is truncated, damaged or no torch"):
        read_pt(path, Record)
    with pytest.raises(CheckpointError, match=r"b\.pt: there is no such file; save it again"):
        read_pt(tmp_path / "b.pt", Record)


def test_a_changed_byte_is_found_where_it_is_looked_for(tmp_path: Path) -> None:
    """torch reads weights whose checksum differs without a word: a resumed run would go on from noise."""
    path = tmp_path / "a.pt"
    torch.save({"weights": torch.full((1000,), 7.0)}, path)
    content = bytearray(path.read_bytes())
    content[content.index(b"\x00\x00\xe0\x40" * 8) + 16] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="truncated, damaged"):
        read_pt(path, dict[str, Any], verify=True)


def test_values_are_shown_in_a_few_printable_words() -> None:
    """A value of a file that is printed as it is can clear the screen, or fill it."""
    assert shown("a\x1b[2J" + "b" * 500) == repr("a\x1b[2J" + "b" * 55)
    assert shown(10**5000) == "a number without end"
    assert [shown(value) for value in ({}, [], None, True)] == ["an object", "a list", "None", "True"]
