"""What strangers wrote, on its way to a terminal, a log or JSON."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipgraft.cli import eval as eval_command
from clipgraft.cli.main import main
from clipgraft.errors import DataError, together
from clipgraft.files import write_json
from clipgraft.progress import showing
from clipgraft.shown import shown, shown_line

HARMFUL = "\x00\x07\x08\r\x1b\x7f\x85\x9b\u200e\u200f\u2028\u2029\u202a\u202e\u2066\u2069\u061c"


@given(st.text(alphabet=st.one_of(st.characters(), st.sampled_from(HARMFUL))))
def test_nothing_harmful_is_left(text: str) -> None:
    """One escape sequence in a caption clears the screen of whoever searches for it."""
    seen = shown(text)
    assert not set(seen) & set(HARMFUL)
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in shown_line(text))


@given(st.text(alphabet=st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(HARMFUL))))
def test_json_stays_json(text: str) -> None:
    """What reads our JSON must get the caption as it was."""
    assert json.loads(shown(json.dumps([text], ensure_ascii=False))) == [text]


def test_words_of_people_are_left_alone() -> None:
    """Vietnamese, joined emoji, Hebrew and Persian with its joiners are no attack."""
    words = "một con mèo 👩‍🚀 שלום می‌خواهم\tx\n"
    assert shown(words) == words


@pytest.mark.parametrize("by", ["print", "log", "error"])
def test_no_way_to_the_terminal_is_open(
    by: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file called ESC ]0;… would retitle the terminal from whichever line names it."""

    def say(_: Any) -> None:
        if by == "print":
            print(HARMFUL)
        elif by == "log":
            logging.getLogger("clipgraft").info("%s", HARMFUL)
        else:
            raise DataError(f"x{HARMFUL}y")

    monkeypatch.setattr(eval_command, "run_eval", say)
    code = main(["eval"])
    told = capsys.readouterr()
    assert code == (2 if by == "error" else 0)
    assert (told.out + told.err).strip().isprintable()
    assert "\\u001b" in told.out + told.err


def test_text_of_strangers_stays_on_its_line() -> None:
    """A path with a line break makes two lines of a message, the second of a stranger's choosing."""
    assert shown_line("a\nb\x1b[2J\u202ec") == "a | b\\u001b[2J\\u202ec"
    assert shown_line("x" * 300, 200) == "x" * 200 + "…"


NAME = "a\nclipgraft: done\r\x1b[2J.jpg"


@pytest.mark.parametrize("by", ["error", "faults", "system", "log", "warning", "bar"])
def test_no_name_begins_a_line_of_ours(
    by: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file called `x, line end, clipgraft: saved` would say in our name what never happened."""

    def say(_: Any) -> None:
        if by == "error":
            raise DataError(f"{NAME} is missing")
        if by == "faults":
            raise together([f"{NAME} is missing", "--lr: two faults"])
        if by == "system":
            raise FileNotFoundError(2, "No such file", NAME)
        if by == "log":
            logging.getLogger("clipgraft").info("%s: read", Path(NAME))
        elif by == "warning":
            sys.stderr.write(warnings.formatwarning(NAME.replace("\n", ""), UserWarning, "x.py", 1))
        else:
            with showing(True, NAME) as bar:
                assert bar is not None
                bar(1, 2)

    monkeypatch.setattr(eval_command, "run_eval", say)
    main(["eval"])
    told = capsys.readouterr()
    lines = (told.out + told.err).split("\n")
    assert not any(line.startswith("clipgraft: done") for line in lines)
    assert "\\u001b[2J" in told.out + told.err
    assert "\x1b[2J" not in told.out + told.err
    assert len([line for line in lines if line.startswith("clipgraft: ")]) == {
        "faults": 2,
        "error": 1,
        "system": 1,
    }.get(by, 0)


def test_json_files_hold_no_raw_controls(tmp_path: Path) -> None:
    """`cat results.json` is a terminal too."""
    write_json(tmp_path / "a.json", {"caption": HARMFUL})
    content = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert not set(content) & set(HARMFUL)
    assert json.loads(content) == {"caption": HARMFUL}
