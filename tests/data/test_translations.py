"""Tables of translations: which columns, what is counted, what is refused, and what is held out."""

from __future__ import annotations

import csv
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

import clipgraft as cg
from clipgraft.data.translations import Translations, read_translations, split_translations, tell_tokens
from clipgraft.errors import ConfigError, DataError

ROWS = [("a cat", "một con mèo"), ("a dog", "một con chó"), ("a cat", "con mèo")]
READ = Translations(("a cat", "a dog"), (("một con mèo", "con mèo"), ("một con chó",)))


def table(folder: Path, *rows: tuple[str, ...], header: tuple[str, ...] = ("en", "vi")) -> Path:
    path = folder / "t.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def written(folder: Path) -> dict[Path, dict[str, Any]]:
    """The same table in every kind of file, with the options that it needs."""
    import openpyxl

    book = openpyxl.Workbook()
    book.active.append(("old", "sheet"))
    sheet = book.create_sheet("words")
    for row in [("en", "vi"), *ROWS]:
        sheet.append(row)
    book.save(folder / "t.xlsx")
    lines = [json.dumps({"note": 1, "source": source, "target": target}) for source, target in ROWS]
    (folder / "t.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with sqlite3.connect(folder / "t.db") as base:
        base.execute("CREATE TABLE words (en TEXT, vi TEXT)")
        base.executemany("INSERT INTO words VALUES (?, ?)", ROWS)
    return {
        table(folder, *ROWS): {},
        folder / "t.xlsx": {"sheet": "words"},
        folder / "t.jsonl": {},
        folder / "t.db": {"query": "SELECT vi, en FROM words"},
    }


def test_every_kind_of_table_gives_the_same(tmp_path: Path) -> None:
    """A spreadsheet, JSON Lines or a database would be read otherwise than a CSV, or sides be swapped."""
    for path, options in written(tmp_path).items():
        assert read_translations(path, **options) == READ, path


def test_guessed_columns_are_said(tmp_path: Path) -> None:
    """A column would be chosen in silence, and a wrong one be learnt."""
    report = read_translations(table(tmp_path, *ROWS, header=("English", "Việt"))).report
    assert report is not None
    assert any('`csv_source_key` "English"' in note and '"Việt"' in note for note in report.notes)
    three = [(*row, "x") for row in ROWS]
    path = table(tmp_path, *three, header=("English", "Việt", "note"))
    with pytest.raises(
        DataError, match=r'`csv_target_key`: no column "target"; it has "English", "Việt", "note"'
    ):
        read_translations(path)
    assert read_translations(path, csv_target_key="Việt") == READ
    both = read_translations(path, csv_target_key="Việt, note")
    assert both.targets[1] == ("một con chó", "x")


def test_missing_sides_are_counted(tmp_path: Path) -> None:
    """Rows that lack a side would be trained on as empty texts, or vanish in silence."""
    bad = [("a hat", ""), ("", "cái mũ"), ("nan", "cái mũ"), ("a hat", "nan"), ("x", "x"), ROWS[0]]
    report = read_translations(table(tmp_path, *ROWS, *bad)).report
    assert report is not None
    assert (report.rows, report.bad_rows, report.sources, report.targets) == (9, 4, 3, 4)
    assert dict(report.reasons) == {"no translation": 2, "no source text": 2}
    assert (report.empty_targets, report.null_targets) == (1, 1)
    assert (report.repeated_targets, report.untranslated) == (1, 1)
    assert "line 5: a hat no translation" in report.summary()
    with pytest.raises(DataError, match="more than 2 rows cannot be used"):
        read_translations(table(tmp_path, *ROWS, *bad), max_bad_rows=2)
    with pytest.raises(DataError, match="none of its 2 rows has both sides"):
        read_translations(table(tmp_path, *bad[:2]))


def test_one_side_twice_is_refused(tmp_path: Path) -> None:
    """A run would learn to stay as it is, and say that it went well."""
    with pytest.raises(ConfigError, match="name one column"):
        read_translations(table(tmp_path, *ROWS), csv_source_key="en", csv_target_key="en")
    with pytest.raises(DataError, match="every translation is its source text itself"):
        read_translations(table(tmp_path, ("a cat", "a cat"), ("a dog", "a dog")))


def test_folders_and_tar_files_are_no_tables(tmp_path: Path) -> None:
    """Names of images would be taken for source texts."""
    cg.emoji.write_scenes(tmp_path, "val", 2, ["en"])
    for image in (tmp_path / "images").iterdir():
        image.with_suffix(".txt").write_text("a caption", encoding="utf-8")
    with pytest.raises(DataError, match="is no table; name one of source texts and their translations"):
        read_translations(tmp_path / "images")


def test_a_language_in_bytes_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """A user would wonder why a language that the tokenizer does not know is learnt so badly."""
    texts = Translations(("two words", "three more words"), (("một hai",), ("a", "b c")))

    def count(texts: Any) -> list[int]:
        return [2 + (len(text.encode()) if text.startswith("m") else len(text.split())) for text in texts]

    # 5 words of sources in 5 tokens; translations: 9 bytes, 1 and 2 words, for 2 + 3 + 3 words of sources.
    told = tell_tokens(texts, count, 10)
    tokens = texts.count_tokens(count, 10)
    assert (tokens.source, tokens.target, tokens.long_targets) == (1.0, 12 / 8, 1)
    assert not caplog.records
    tell_tokens(Translations(("ab c",), (("mmmmmm",),)), count, 10)
    assert "1.00 in the source, 3.00 in the translation (3.0 times)" in caplog.text
    assert told.report is None


def test_held_out_texts_are_in_one_part() -> None:
    """Validation would be on texts that were trained on."""
    texts = Translations(tuple(map(str, range(50))), tuple((f"{n}a", f"{n}b") for n in range(50)))
    train, val = split_translations(texts)
    assert (len(train), len(val)) == (45, 5)
    assert {*train.sources} | {*val.sources} == {*texts.sources}
    assert all(
        group == (f"{source}a", f"{source}b") for source, group in zip(val.sources, val.targets, strict=True)
    )
    assert split_translations(texts)[1] == val
    assert len(split_translations(texts, 0.5)[1]) == 25
    with pytest.raises(DataError, match="give two or more"):
        split_translations(Translations(("a",), (("b",),)))
