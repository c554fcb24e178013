"""From a table to images with their captions: grouping, paths, what is skipped and when reading stops."""

from __future__ import annotations

import json
import subprocess
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from clipgraft.data import reader
from clipgraft.data.args import TableArgs
from clipgraft.data.datasets import Pairs
from clipgraft.data.reader import find_duplicates, names_images, read_pairs, read_texts
from clipgraft.errors import ConfigError, DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six different images, img/0.png to img/5.png."""
    (tmp_path / "img").mkdir()
    for i in range(6):
        Image.new("RGB", (8, 6), (i * 40, 0, 0)).save(tmp_path / f"img/{i}.png")
    return tmp_path


def table(folder: Path, *rows: tuple[str, str], name: str = "train.csv") -> Path:
    """A tab-separated table with open_clip's header."""
    path = folder / name
    path.write_text("\n".join(["filepath\ttitle", *("\t".join(row) for row in rows)]), encoding="utf-8")
    return path


def test_rows_of_one_image_are_grouped(folder: Path) -> None:
    """An image's other captions would count as wrong answers, in training and in recall."""
    rows = [
        ("img/1.png", "b1"),
        ("img/0.png", "a1"),
        ("img/1.png", "b2"),
        ("img/0.png", "a2"),
        ("img/1.png", "b3"),
    ]
    pairs = read_pairs(table(folder, *rows))
    report = pairs.report
    assert pairs == Pairs(
        images=(folder / "img/1.png", folder / "img/0.png"), captions=(("b1", "b2", "b3"), ("a1", "a2"))
    )
    assert pairs.rows() == [(0, "b1"), (0, "b2"), (0, "b3"), (1, "a1"), (1, "a2")]
    assert (report.rows, report.images, report.captions) == (5, 2, 5)
    assert (report.fewest_captions, report.most_captions) == (2, 3)
    assert report.bad_rows == report.repeated_captions == 0


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(
    rows=st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["một", "hai", "ba", " ba ", ""])), min_size=1)
)
def test_grouping_against_a_plain_loop(folder: Path, rows: list[tuple[int, str]]) -> None:
    """Captions would move to another image, be lost, or be counted wrongly, for some order of the rows."""
    path = table(folder, *((f"img/{i}.png", caption) for i, caption in rows))
    expected: dict[int, list[str]] = {}
    for i, caption in rows:
        if caption.strip() and caption.strip() not in expected.setdefault(i, []):
            expected[i].append(caption.strip())
    expected = {i: captions for i, captions in expected.items() if captions}
    if not expected:
        with pytest.raises(DataError, match="none of its"):
            read_pairs(path)
        return
    pairs = read_pairs(path)
    report = pairs.report
    first_use = sorted(expected, key=lambda i: [j for j, caption in rows if caption.strip()].index(i))
    assert [int(image.stem) for image in pairs.images] == first_use
    assert dict(zip(first_use, map(list, pairs.captions), strict=True)) == expected
    empty = sum(not caption.strip() for _, caption in rows)
    assert (report.empty_captions, report.bad_rows) == (empty, empty)
    assert report.repeated_captions == len(rows) - empty - report.captions


def test_ways_to_write_one_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables made on Windows, or with absolute paths, would find nothing or count one image several times."""
    monkeypatch.chdir(folder.parent)
    spellings = ["img/0.png", "img\\0.png", "./img/0.png", "img/../img/0.png", str(folder / "img/0.png")]
    pairs = read_pairs(table(folder, *((spelling, f"c{i}") for i, spelling in enumerate(spellings))))
    assert pairs == Pairs((folder / "img/0.png",), (("c0", "c1", "c2", "c3", "c4"),))


@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
@pytest.mark.parametrize("in_table", ["NFC", "NFD"])
def test_accented_file_names(folder: Path, on_disk: str, in_table: str) -> None:
    """Vietnamese file names that went through macOS or a zip archive would be reported missing."""
    name = "bánh mì Đặc biệt.png"
    image = folder / unicodedata.normalize(on_disk, name)
    (folder / "img/0.png").rename(image)
    pairs = read_pairs(table(folder, (unicodedata.normalize(in_table, name), "bánh mì")))
    assert [path.read_bytes() for path in pairs.images] == [image.read_bytes()]


def test_captions_come_through_unchanged(folder: Path) -> None:
    """Vietnamese letters would be recomposed or replaced on the way to the tokenizer."""
    texts = [
        unicodedata.normalize(form, "Người phụ nữ đội nón lá, cười “tươi” 😀") for form in ("NFC", "NFD")
    ]
    pairs = read_pairs(table(folder, ("img/0.png", texts[0]), ("img/0.png", texts[1])))
    assert pairs.captions == (tuple(texts),)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ("img/9.png", "not found in "),
        ("D:\\photos\\0.png", "path on a Windows drive"),
        ("https://example.com/0.png", "download the image first"),
        ("img", "is a folder, not an image"),
        ("/nowhere/0.png", "not found"),
        ("x" * 5000, "the path cannot be read"),
    ],
)
def test_missing_image_says_why(folder: Path, image: str, reason: str) -> None:
    """`Not found` alone would leave the user guessing where it was looked for."""
    report = read_pairs(table(folder, ("img/0.png", "a"), (image, "b"), (image, "c"))).report
    assert (report.missing_images, report.bad_rows, report.images) == (1, 2, 1)
    assert [row.number for row in report.first_bad] == [3]
    assert reason in report.first_bad[0].reason


def test_paths_relative_to_the_working_directory_are_explained(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Someone coming from open_clip, which reads paths from where it runs, would not see what differs."""
    monkeypatch.chdir(folder)
    (folder / "lists").mkdir()
    path = table(folder, ("img/0.png", "a"), name="lists/train.csv")
    with pytest.raises(DataError, match=r"but in the working directory; add `image_root='\.'`"):
        read_pairs(path)
    pairs = read_pairs(path, image_root=".")
    assert pairs.images == (Path("img/0.png"),)
    with pytest.raises(ConfigError, match="`image_root` nowhere: there is no such folder"):
        read_pairs(path, image_root="nowhere")


@pytest.mark.parametrize(
    ("text", "found", "how"),
    [
        ("0", "img/0.png", "in img/ and with .png"),
        ("img/0", "img/0.png", "with .png"),
        ("img/0.PNG", "img/0.png", "in other case"),
        ("IMG/1.png", "img/1.png", "in other spelling"),
        ("2.png", "img/2.png", "in img/"),
        ("3", "img/deep/3.JPG", ""),
    ],
)
def test_images_that_are_nearly_where_the_table_says(folder: Path, text: str, found: str, how: str) -> None:
    """Ids without a suffix, other case and sub-folders would each be `not found`, or be used unsaid."""
    (folder / "img/3.png").unlink()
    (folder / "img/deep").mkdir()
    Image.new("RGB", (8, 6), "red").save(folder / "img/deep/3.JPG")
    pairs = read_pairs(table(folder, (text, "a")))
    report = pairs.report
    assert pairs.images == (folder / found,)
    assert how in " ".join(report.notes)
    assert f"{text} is {found}" in " ".join(report.notes)


def test_none_of_several_images_is_taken(folder: Path) -> None:
    """Of two images of a name in two sub-folders, one would be taken at random."""
    (folder / "other").mkdir()
    Image.new("RGB", (8, 6), "red").save(folder / "other/0.png")
    with pytest.raises(DataError, match=r"may be one of 2 files: img/0\.png, other/0\.png; write which"):
        read_pairs(table(folder, ("0.png", "a")))
    assert read_pairs(table(folder, ("0.png", "a")), image_root=folder / "other").images == (
        folder / "other/0.png",
    )


def test_rows_add_up(folder: Path) -> None:
    """Rows would vanish between what is used and what is left out."""
    rows = [
        ("img/0.png", "a"),
        ("img/1.png", "nan"),
        ("img/2.png", ""),
        ("x.png", "b"),
        ("img/3.png", "c", "d"),
    ]
    report = read_pairs(table(folder, *rows)).report
    assert report.rows == report.images + sum(count for _, count in report.reasons) == 5
    assert dict(report.reasons) == {"caption is nan or the like": 1, "empty caption": 1, "image not found": 1}
    assert (report.null_captions, report.empty_captions) == (1, 1)
    assert any("1 rows have more cells than the header" in note for note in report.notes)
    text = report.summary()
    assert "2 of them used" in text
    assert "`keep_nulls`" in text


def test_coco_captions(folder: Path) -> None:
    """COCO's captions, the form of most public sets, would need a script."""
    images = [{"id": 7, "file_name": "0.png"}, {"id": 8, "file_name": "1.png"}]
    notes = [
        {"image_id": 8, "caption": "b"},
        {"image_id": 7, "caption": "a"},
        {"image_id": 9, "caption": "c"},
    ]
    path = folder / "captions_val2017.json"
    path.write_text(json.dumps({"images": images, "annotations": notes}))
    pairs = read_pairs(path)
    report = pairs.report
    assert pairs == Pairs((folder / "img/1.png", folder / "img/0.png"), (("b",), ("a",)))
    assert (report.rows, report.bad_rows) == (3, 1)
    path.write_text(json.dumps({"images": images, "annotations": [{"image_id": 8, "bbox": [1]}]}))
    with pytest.raises(DataError, match="without captions"):
        read_pairs(path)


def test_the_advice_for_compressed_tars_works(folder: Path) -> None:
    """The command in the message would not run, or leave the captions behind."""
    (folder / "img/0.txt").write_text("a dog")
    with tarfile.open(folder / "shard-0.tar.gz", "w:gz") as tar:
        for name in ("0.png", "0.txt"):
            tar.add(folder / "img" / name, name)
    with pytest.raises(DataError) as error:
        read_pairs(folder / "shard-0.tar.gz")
    subprocess.run(["bash", "-c", str(error.value).partition("that is not: ")[2]], cwd=folder, check=True)
    assert read_pairs(folder / "shard-0.tar").captions == (("a dog",),)


def test_images_inside_parquet_are_unpacked(folder: Path) -> None:
    """The command for images that are read shuffled would not run, or lose captions."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from clipgraft.data import parquet

    cells = [{"bytes": (folder / f"img/{n}.png").read_bytes(), "path": "../../x.png"} for n in range(3)]
    path = folder / "train.parquet"
    pq.write_table(pa.table({"image": cells, "caption": [["a", "b"], ["c"], ["d"]], "n": [1, 2, 3]}), path)
    out = folder / "photos"
    assert parquet.main([str(path), str(out)]) == 0
    pairs = read_pairs(out)
    report = pairs.report
    assert pairs.captions == read_pairs(path).captions == (("a", "b"), ("c",), ("d",))
    assert [image.read_bytes() for image in pairs.images] == [cell["bytes"] for cell in cells]
    assert report.bad_rows == 0
    assert parquet.main([str(path), str(out)]) == 2
    assert parquet.main([]) == 2


def test_unreadable_images_are_skipped_and_counted(folder: Path) -> None:
    """One half-copied photo would stop the run, or be trained on."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(folder / "img/cut.jpg")
    (folder / "img/cut.jpg").write_bytes((folder / "img/cut.jpg").read_bytes()[:2000])
    path = table(folder, ("img/0.png", "a"), ("img/cut.jpg", "b"), ("img/1.png", "c"), ("img/cut.jpg", "d"))
    seen: list[tuple[int, int]] = []
    pairs = read_pairs(path, progress=lambda done, total: seen.append((done, total)))
    report = pairs.report
    assert [image.name for image in pairs.images] == ["0.png", "1.png"]
    assert pairs.captions == (("a",), ("c",))
    assert (report.unreadable_images, report.bad_rows, report.rows) == (1, 2, 4)
    assert [(row.number, row.image) for row in report.first_bad] == [(3, "img/cut.jpg")]
    assert "cut short" in report.first_bad[0].reason
    assert seen == [(1, 3), (2, 3), (3, 3)]
    pairs = read_pairs(path, verify="header")
    report = pairs.report
    assert (len(pairs), report.unreadable_images) == (3, 0)
    assert any("only the headers" in note for note in report.notes)


def test_many_images_are_checked_by_header_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A million images would be decoded before the first step, or the shortcut be taken in silence."""
    monkeypatch.setattr(reader, "DECODE_UP_TO", 1)
    path = table(folder, ("img/0.png", "a"), ("img/1.png", "b"))
    assert any("only the headers" in note for note in read_pairs(path).report.notes)
    assert read_pairs(path, verify="decode").report.notes == ()


def test_limit_on_bad_rows(folder: Path) -> None:
    """A wrong folder would silently shrink the data to almost nothing, or two bad rows end the run."""
    rows = [("img/0.png", "a"), *((f"img/x{i}.png", "b") for i in range(4)), ("img/1.png", "")]
    path = table(folder, *rows)
    assert read_pairs(path, max_bad_rows=5).report.bad_rows == 5
    assert read_pairs(path, max_bad_rows=None).report.bad_rows == 5
    with pytest.raises(DataError) as error:
        read_pairs(path, max_bad_rows=2)
    message = str(error.value)
    assert "\n" not in message
    assert "more than 2 rows" in message
    assert "line 3: img/x0.png not found" in message
    assert "line 5: img/x2.png" in message
    assert "`max_bad_rows`" in message
    with pytest.raises(DataError, match="more than 0 rows"):
        read_pairs(path, max_bad_rows=0)
    with pytest.raises(ConfigError, match="max_bad_rows: got -1, allowed is greater than or equal to 0"):
        read_pairs(path, max_bad_rows=-1)


@pytest.mark.parametrize("fault", ["missing", "empty caption", "unreadable", "ragged"])
def test_strict_stops_at_the_first(folder: Path, fault: str) -> None:
    """`strict` would let some kind of bad row pass."""
    (folder / "img/bad.png").write_bytes(b"not an image")
    row = {
        "missing": ("img/x.png", "b"),
        "empty caption": ("img/1.png", " "),
        "unreadable": ("img/bad.png", "b"),
        "ragged": ("img/1.png",),
    }[fault]
    path = table(folder, ("img/0.png", "a"), row, ("img/y.png", "later"))
    with pytest.raises(DataError, match="`strict`") as error:
        read_pairs(path if fault != "unreadable" else table(folder, ("img/0.png", "a"), row), strict=True)
    assert "line 3: " in str(error.value)
    assert "\n" not in str(error.value)


def test_nothing_left(folder: Path) -> None:
    """Training would start on no data at all."""
    with pytest.raises(DataError, match=r"none of its 1 rows can be used \(line 2: img/x.png not found"):
        read_pairs(table(folder, ("img/x.png", "a")))
    with pytest.raises(DataError, match="has no rows, only a header"):
        read_pairs(table(folder))


def test_lists_of_captions(folder: Path) -> None:
    """Five captions in one JSON row would become one caption, or an empty one among them cost all five."""
    path = folder / "t.jsonl"
    path.write_text(
        '{"image": "img/0.png", "caption": ["a", " ", "b", "a"]}\n{"image": "img/1.png", "caption": []}\n'
        '{"image": "img/2.png", "caption": [null, "c"]}\n'
    )
    pairs = read_pairs(path)
    report = pairs.report
    assert pairs.captions == (("a", "b"), ("c",))
    assert (report.empty_captions, report.repeated_captions, report.bad_rows) == (3, 1, 1)
    assert report.first_bad[0].reason == "empty caption"


def test_duplicate_images_are_found_by_content(folder: Path) -> None:
    """The same photo under two names would be its own wrong answer, or leak from training into evaluation."""
    (folder / "img/copy.png").write_bytes((folder / "img/3.png").read_bytes())
    (folder / "img/again.png").write_bytes((folder / "img/3.png").read_bytes())
    names = ["3.png", "4.png", "copy.png", "again.png"]
    pairs = read_pairs(table(folder, *((f"img/{name}", name) for name in names)))
    report = pairs.report
    assert report.duplicates == (tuple(folder / "img" / name for name in ("3.png", "copy.png", "again.png")),)
    assert report.duplicate_images == 2
    assert len(pairs) == 4


def test_equal_size_is_not_a_duplicate(tmp_path: Path) -> None:
    """Uncompressed images, all of one size, would all count as duplicates."""
    for i, content in enumerate([b"aaaa", b"aaab", b"aaaa", b"aaa"]):
        (tmp_path / str(i)).write_bytes(content)
    paths = tuple(tmp_path / str(i) for i in range(4))
    assert find_duplicates(paths) == ((paths[0], paths[2]),)


def test_folder_counts_images_without_caption(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images that nobody captioned would be left out without a word."""
    (folder / "img/bad.png").write_bytes(b"not an image")
    (folder / "img/captions.csv").write_text("image,caption\n0.png,a\n1.png,b\nbad.png,c\n")
    monkeypatch.chdir(folder)
    pairs = read_pairs("img/../img")
    report = pairs.report
    assert len(pairs) == 2
    assert any("4 images in the folder have no caption" in note for note in report.notes)
    assert report.unreadable_images == 1


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def test_pointers_of_git_lfs_are_called_that(folder: Path) -> None:
    """`git clone` without git-lfs leaves small text files: they are neither damaged nor captions."""
    (folder / "img/0.png").write_bytes(POINTER)
    (folder / "img/1.png").write_bytes(b"x")
    pairs = read_pairs(table(folder, *((f"img/{i}.png", f"c{i}") for i in range(6))))
    report = pairs.report
    assert len(pairs.images) == 4
    assert [count for why, count in report.reasons if "git-lfs pointer" in why and "git lfs pull" in why] == [
        1
    ]
    assert report.unreadable_images == 2
    for name in ("t.csv", "t.tsv", "t.parquet", "t.jsonl", "t.json"):
        (folder / name).write_bytes(POINTER)
        with pytest.raises(DataError, match=rf"{name}: it is a git-lfs pointer.*git lfs pull"):
            read_pairs(folder / name)


def test_captions_are_no_pointers_of_git_lfs(folder: Path) -> None:
    """The pictures would be trained to be "version https://git-lfs.github.com/spec/v1"."""
    for i in range(6):
        (folder / f"img/{i}.txt").write_bytes(POINTER if i < 2 else b"a cat")
    pairs = read_pairs(folder / "img")
    report = pairs.report
    assert {caption for captions in pairs.captions for caption in captions} == {"a cat"}
    assert report.bad_rows == 2


def test_plain_lines(tmp_path: Path) -> None:
    """Words of a corpus that is no table are taken for columns, or lost."""
    path = tmp_path / "a.txt"
    path.write_bytes("﻿image, caption\r\n\r\n một con chó \r\nmột con chó\r\n".encode())
    assert read_texts(path) == ("image, caption", "một con chó")


def test_tables(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Captions of a table are not found unless its images are there, too."""
    caplog.set_level("INFO", "clipgraft")
    table = tmp_path / "a.csv"
    table.write_text("filepath\ttitle\nnot-there.jpg\ta dog\nb.jpg\t\nc.jpg\ta dog\nd.jpg\ta cat\n")
    assert read_texts(table) == ("a dog", "a cat")
    assert "1 lines without a text were skipped" in caplog.text
    flickr = tmp_path / "b.txt"
    flickr.write_text("1.jpg#0\ta dog\n1.jpg#1\ta cat\n")
    assert read_texts(flickr) == ("a dog", "a cat")
    listed = tmp_path / "c.txt"
    listed.write_text("picture;words\n1.jpg;a dog\n")
    assert read_texts(listed, csv_img_key="picture", csv_caption_key="words", csv_separator=";") == ("a dog",)
    assert read_texts(listed) == ("picture;words", "1.jpg;a dog")


def test_whether_texts_have_images(tmp_path: Path) -> None:
    """A table of texts alone would be refused where an image tower trains, or pictures not be looked at."""
    files = {
        "lines.txt": ("a dog\na cat\n", False),
        "flickr.txt": ("1.jpg#0\ta dog\n1.jpg#1\ta cat\n", True),
        "pairs.csv": ("filepath\ttitle\n1.jpg\ta dog\n", True),
        "texts.csv": ("id\tcaption\n1\ta dog\n", False),
        "pairs.jsonl": ('{"image": "1.jpg", "caption": "a dog"}\n', True),
        "texts.jsonl": ('{"caption": "a dog"}\n', False),
    }
    for name, (content, _) in files.items():
        (tmp_path / name).write_text(content)
    found = {name: names_images(tmp_path / name) for name in files}
    assert found == {name: has for name, (_, has) in files.items()}


def test_nothing_to_read(tmp_path: Path) -> None:
    """An empty corpus gives a model that knows no word, without a word said."""
    (tmp_path / "a.txt").write_text(" \n\n")
    with pytest.raises(DataError, match="holds no text"):
        read_texts(tmp_path / "a.txt")
    with pytest.raises(DataError, match="not found"):
        read_texts(tmp_path / "b.txt")


def test_data_print_what_was_read(folder: Path) -> None:
    """Who prints what was read would see every path, or not learn that rows were left out."""
    pairs = read_pairs(table(folder, ("img/0.png", "a"), ("img/0.png", "b"), ("img/lost.png", "c")))
    source = pairs.report.source
    assert repr(pairs) == f"Pairs(1 images, 2 captions; {source}: 1 of 3 lines skipped)"
    assert repr(pairs[:1]) == "Pairs(1 images, 2 captions)"
    assert pairs[:1] == pairs
    assert len(repr(pairs.report).splitlines()) == 1
    assert "1 of 3" not in repr(read_pairs(table(folder, ("img/0.png", "a"))))


def test_options_are_one_value(folder: Path) -> None:
    """A misspelt option would be ignored, or single ones not go together with a value of several."""
    path = folder / "t.csv"
    path.write_text("photo;words\nimg/0.png;a dog\n", encoding="utf-8")
    columns = TableArgs(csv_img_key="photo", csv_caption_key="words")
    assert read_pairs(path, columns).captions == (("a dog",),)
    assert read_pairs(path, columns, csv_separator=";", strict=True).captions == (("a dog",),)
    with pytest.raises(DataError, match='`csv_img_key`: no column "image"'):
        read_pairs(path, columns, csv_img_key="image")
    with pytest.raises(ConfigError, match=r"csv_image_key.*did you mean csv_img_key"):
        read_pairs(path, csv_image_key="photo")
