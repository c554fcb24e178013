"""Images with classes: how they are read, and what is refused."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from clipgraft.data import reader
from clipgraft.data.datasets import Labelled
from clipgraft.data.reader import read_labelled
from clipgraft.errors import DataError


def draw(path: Path, shade: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 5), (shade, 255 - shade, 40)).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two cats, one of them deeper, and three dogs; all differ."""
    root = tmp_path / "pets"
    for shade, name in enumerate(["dog/b.png", "dog/a.png", "dog/c.jpg", "cat/x.png", "cat/old/1999/y.png"]):
        draw(root / name, 40 * shade)
    return root


def line(text: str, start: str) -> str:
    """The one line of the summary that begins with `start`."""
    (found,) = [row for row in text.splitlines() if row.strip().startswith(start)]
    return " ".join(found.split())


def message(error: pytest.ExceptionInfo[Exception]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_folder_right_below_is_the_class(folder: Path) -> None:
    """Images in sub-folders of a class would be lost, or make classes of their own."""
    data = read_labelled(folder)
    report = data.report
    assert data.classes == ("cat", "dog")
    assert {path.relative_to(folder).as_posix(): data.classes[i] for path, i in pairs(data)} == {
        "cat/old/1999/y.png": "cat",
        "cat/x.png": "cat",
        "dog/a.png": "dog",
        "dog/b.png": "dog",
        "dog/c.jpg": "dog",
    }
    assert (len(data), data.counts(), report.images, report.counts) == (5, (2, 3), 5, (2, 3))
    assert report.bad_rows == 0


def pairs(data: Labelled) -> list[tuple[Path, int]]:
    return list(zip(data.images, data.labels, strict=True))


def test_hidden_and_loose_files_are_left_out(folder: Path) -> None:
    """macOS' ._ files would count as broken images, and .thumbnails be trained on."""
    (folder / "cat/._x.png").write_bytes(b"resource fork")
    draw(folder / "dog/.thumbnails/a.png", 1)
    draw(folder / ".cache/z.png", 2)
    draw(folder / "loose.png", 3)
    data = read_labelled(folder)
    report = data.report
    assert (len(data), data.classes, report.bad_rows) == (5, ("cat", "dog"), 0)
    assert report.notes == (
        "7 files: 6 images, 1 hidden",
        "2 hidden folders were left out",
        "not used: images that lie beside the class folders (1)",
    )


def test_an_empty_class_folder_is_named_and_left_out(folder: Path) -> None:
    """A class nobody can be told apart from would be an output of the classifier, silently."""
    (folder / "axolotl").mkdir()
    (folder / "yak").mkdir()
    (folder / "yak/broken.png").write_bytes(b"")
    data = read_labelled(folder)
    report = data.report
    assert data.classes == ("cat", "dog")
    assert report.empty_classes == ("axolotl", "yak")
    assert line(report.summary(), "empty classes") == "empty classes 2 left out: axolotl, yak"


def test_unreadable_images_are_counted_with_every_reason(folder: Path) -> None:
    """A user would not learn which of their files are broken, or a single one would stop the run."""
    (folder / "dog/empty.png").write_bytes(b"")
    (folder / "dog/empty2.png").write_bytes(b"")
    whole = (folder / "dog/c.jpg").read_bytes()
    (folder / "cat/cut.jpg").write_bytes(whole[: len(whole) // 2])
    data = read_labelled(folder)
    report = data.report
    assert len(data) == 5
    assert (report.bad_rows, report.unreadable_images) == (3, 3)
    assert sum(count for _, count in report.reasons) == 3
    assert dict(report.reasons)["the file is empty (0 bytes)"] == 2
    text = report.summary()
    assert "cat/cut.jpg" in text
    assert line(text, "unreadable images").startswith("unreadable images 3 skipped")
    with pytest.raises(DataError, match=r"image 1: cat/cut.jpg.*`strict`"):
        read_labelled(folder, strict=True)
    with pytest.raises(DataError, match=r"more than 2 rows.*`max_bad_rows`"):
        read_labelled(folder, max_bad_rows=2)


def table(folder: Path, kind: str, rows: list[tuple[str, object]], columns: tuple[str, str]) -> Path:
    path = folder / f"labels.{kind}"
    if kind == "jsonl":
        lines = (json.dumps(dict(zip(columns, row, strict=True))) for row in rows)
        path.write_text("\n".join(lines), encoding="utf-8")
    elif kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        cells = dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True))
        pyarrow.parquet.write_table(pyarrow.table(cells), path)
    else:
        mark = {"csv": ",", "tsv": "\t"}[kind]
        path.write_text("\n".join(mark.join(map(str, row)) for row in [columns, *rows]), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
@pytest.mark.parametrize("columns", [("filepath", "label"), ("Image", "Category"), ("path", "class_name")])
def test_every_kind_of_table_is_read(folder: Path, kind: str, columns: tuple[str, str]) -> None:
    """A table that other tools wrote would have to be rewritten by hand."""
    rows: list[tuple[str, object]] = [("dog/a.png", "dog"), ("cat/x.png", "cat"), ("dog/b.png", "dog")]
    data = read_labelled(table(folder, kind, rows, columns))
    report = data.report
    assert data.classes == ("cat", "dog")
    assert [(path.name, label) for path, label in pairs(data)] == [("a.png", 1), ("x.png", 0), ("b.png", 1)]
    assert report.rows == 3
    guessed = columns[1] != "label"
    assert any(f'`csv_label_key` "{columns[1]}"' in note for note in report.notes) is guessed


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_numbers_are_labels(folder: Path, kind: str) -> None:
    """The labels of most benchmark tables, which are numbers, would all be bad rows."""
    rows: list[tuple[str, object]] = [("dog/a.png", 7), ("cat/x.png", 0), ("dog/b.png", 7)]
    data = read_labelled(table(folder, kind, rows, ("image", "target")))
    assert (data.classes, data.labels) == (("0", "7"), (1, 0, 1))


def test_an_empty_cell_among_numbers_is_one_bad_row(folder: Path) -> None:
    """Pandas writes such a column as floats: class 7 would be called 7.0, and the empty cell a class nan."""
    rows: list[tuple[str, object]] = [("dog/a.png", 7.0), ("cat/x.png", 0.0), ("dog/b.png", float("nan"))]
    data = read_labelled(table(folder, "parquet", rows, ("image", "label")))
    report = data.report
    assert (data.classes, report.reasons) == (("0", "7"), (("no label", 1),))


def test_named_columns_and_separator(folder: Path) -> None:
    """A table with several label columns could not be used for any but the first."""
    path = folder / "labels.csv"
    path.write_text("label;file;breed\n1;dog/a.png;pug\n1;cat/x.png;manx", encoding="utf-8")
    data = read_labelled(path, csv_label_key="breed", csv_separator=";")
    assert data.classes == ("manx", "pug")


def test_one_spelling_of_accents_is_one_class(folder: Path) -> None:
    """A Vietnamese class from macOS and the same from Windows would be two classes."""
    name = "chó"
    rows: list[tuple[str, object]] = [
        ("dog/a.png", unicodedata.normalize("NFD", name)),
        ("dog/b.png", unicodedata.normalize("NFC", name)),
        ("cat/x.png", "mèo"),
    ]
    data = read_labelled(table(folder, "csv", rows, ("image", "label")))
    assert (len(data.classes), data.counts()) == (2, (2, 1))


def test_a_missing_label_column_lists_the_columns(folder: Path) -> None:
    """A user with another column name would have to guess what is wanted."""
    path = table(folder, "csv", [("dog/a.png", "dog")], ("image", "lable"))
    with pytest.raises(DataError) as error:
        read_labelled(path)
    assert '"image", "lable"' in message(error)
    assert 'did you mean "lable"' in message(error)
    with pytest.raises(DataError) as error:
        read_labelled(path, csv_label_key="breed")
    assert 'no column "breed"' in message(error)


def test_two_labels_of_one_image_are_refused(folder: Path) -> None:
    """The image would be a wrong answer whatever the classifier says, in training and in the score."""
    rows: list[tuple[str, object]] = [
        ("dog/a.png", "dog"),
        ("cat/x.png", "cat"),
        ("./dog/../dog/a.png", "cat"),
    ]
    with pytest.raises(DataError) as error:
        read_labelled(table(folder, "csv", rows, ("image", "label")))
    assert '"dog" (line 2)' in message(error)
    assert '"cat" (line 4)' in message(error)
    rows = [("dog/a.png", ["dog", "cat"]), ("cat/x.png", "cat")]
    with pytest.raises(DataError, match=r"line 1.*an image has one class"):
        read_labelled(table(folder, "jsonl", rows, ("image", "label")))


def test_a_row_that_is_repeated_is_one_image(folder: Path) -> None:
    """A repeated row would weigh double in training and in accuracy."""
    rows: list[tuple[str, object]] = [("dog/a.png", "dog"), ("cat/x.png", "cat"), ("dog/a.png", "dog")]
    data = read_labelled(table(folder, "csv", rows, ("image", "label")))
    report = data.report
    assert (len(data), report.rows, report.bad_rows) == (2, 3, 0)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], "no class folders"),
        (["1.png", "2.png"], "no class folders, only images (2)"),
        (["dog/1.png", "dog/2.png"], 'one class only, "dog"'),
        (["train/dog/1.png", "train/cat/2.png", "val/dog/3.png"], "parts of a data set (train, val)"),
    ],
)
def test_folders_that_are_no_class_folders(tmp_path: Path, names: list[str], expected: str) -> None:
    """A classifier of one class, or of the classes "train" and "val", would be trained without a word."""
    for shade, name in enumerate(names):
        draw(tmp_path / name, shade)
    with pytest.raises(DataError) as error:
        read_labelled(tmp_path)
    assert expected in message(error)


def test_empty_class_folders_alone_are_refused(tmp_path: Path) -> None:
    """An unfinished download would end in a traceback."""
    (tmp_path / "cat").mkdir()
    (tmp_path / "dog").mkdir()
    with pytest.raises(DataError, match="none of its 2 folders holds an image"):
        read_labelled(tmp_path)


def test_missing_files_and_labels_are_told_apart(folder: Path) -> None:
    """A user would look for files where labels are missing."""
    rows: list[tuple[str, object]] = [
        ("dog/a.png", "dog"),
        ("cat/x.png", "cat"),
        ("cat/lost.png", "cat"),
        ("dog/b.png", ""),
    ]
    data = read_labelled(table(folder, "csv", rows, ("image", "label")))
    report = data.report
    assert (len(data), report.missing_images, report.bad_rows) == (2, 1, 2)
    assert dict(report.reasons)["no label"] == 1


def test_the_same_picture_in_two_classes_is_reported(folder: Path) -> None:
    """The classifier would be asked to give one picture two answers."""
    (folder / "cat/copy.png").write_bytes((folder / "dog/a.png").read_bytes())
    report = read_labelled(folder).report
    assert len(report.mixed_duplicates) == 1
    shown = line(report.summary(), "of these in two classes")
    assert "cat/copy.png = dog/a.png" in shown


def test_imbalance_is_shown(folder: Path) -> None:
    """A data set that is nearly all one class would look balanced."""
    for shade in range(5):
        draw(folder / f"dog/more{shade}.png", 200 + shade)
    report = read_labelled(folder).report
    text = report.summary()
    assert report.imbalance == 4
    assert line(text, "largest class").startswith("largest class 8 dog, 4.0 times the smallest")
    assert line(text, "smallest class") == "smallest class 2 cat"


def test_many_classes_fit_a_screen(tmp_path: Path) -> None:
    """The summary of 1,000 classes would scroll everything else away."""
    for index in range(60):
        draw(tmp_path / f"class{index:02}/0.png", index)
    report = read_labelled(tmp_path).report
    text = report.summary()
    assert "... 20 more ..." in text
    assert len(text.splitlines()) < 60


def test_only_headers_of_very_many_images(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A million images would be decoded before training starts."""
    monkeypatch.setattr(reader, "DECODE_UP_TO", 3)
    Image.effect_noise((64, 64), 50).save(folder / "dog/c.jpg")
    whole = (folder / "dog/c.jpg").read_bytes()
    (folder / "dog/c.jpg").write_bytes(whole[: len(whole) // 2])
    data = read_labelled(folder)
    report = data.report
    assert (len(data), report.bad_rows) == (5, 0)
    assert "headers" in report.notes[-1]


def test_progress_is_told(folder: Path) -> None:
    """A long check would show no sign of life."""
    seen: list[tuple[int, int]] = []
    read_labelled(folder, workers=1, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 5) for done in range(1, 6)]
