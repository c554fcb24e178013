"""Tables of every kind, as people really write them: read whole, or refused in one clear line."""

from __future__ import annotations

import configparser
import csv
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from clipgraft.data import doors
from clipgraft.data.args import TableArgs
from clipgraft.data.doors import Door, open_table
from clipgraft.data.reader import read_labelled, read_pairs, read_texts
from clipgraft.data.table import (
    IMAGES,
    TEXTS,
    BadRow,
    Header,
    Row,
    Rows,
    Table,
    Wanted,
    choose_columns,
    is_null,
    make_row,
)
from clipgraft.errors import ClipgraftError, ConfigError, DataError

quick = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
VIETNAMESE = "Một con chó đen đang chạy trên bãi cỏ, miệng ngậm quả bóng “đỏ”."


def written(path: Path, content: str | bytes) -> Path:
    """The path, after its content was written as it is."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read_table(path: Path, **options: Any) -> Table:
    """The table, opened with options that are given one by one."""
    return open_table(path, TableArgs(**options))


def good(table: Table) -> list[tuple[str, str]]:
    """(image, caption) of every row; no row may be bad."""
    rows = list(table.rows())
    assert all(isinstance(row, Row) for row in rows), rows
    return [(row.image, caption) for row in rows for caption in row.texts]


def bad(table: Table) -> list[tuple[int, str]]:
    """(line, reason) of every bad row."""
    return [(row.number, row.reason) for row in table.rows() if isinstance(row, BadRow)]


def one_line(error: pytest.ExceptionInfo[ClipgraftError]) -> str:
    """The message, which must be a single line."""
    message = str(error.value)
    assert "\n" not in message
    return message


def test_open_clip_defaults(tmp_path: Path) -> None:
    """A file that open_clip trains on would need other flags here."""
    path = written(tmp_path / "train.csv", f"filepath\ttitle\na.jpg\t{VIETNAMESE}\nb.jpg\tb, with a comma\n")
    table = read_table(path)
    assert good(table) == [("a.jpg", VIETNAMESE), ("b.jpg", "b, with a comma")]
    assert table.notes == ()
    assert table.folder == tmp_path


def test_guide_flags(tmp_path: Path) -> None:
    """The guide's own command (image, caption, comma) would not run."""
    path = written(tmp_path / "train.csv", f'image,caption\na.jpg,"{VIETNAMESE}"\n')
    table = read_table(
        path, dataset_type="csv", csv_img_key="image", csv_caption_key="caption", csv_separator=","
    )
    assert good(table) == [("a.jpg", VIETNAMESE)]
    assert table.notes == ()


cells = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40).filter(
    lambda text: not is_null(text.strip())
) | st.sampled_from(
    [
        VIETNAMESE,
        'he said "hi"',
        "a,b;c|d\te",
        "two\nlines",
        "two\r\nlines",
        "old\rmac",
        "\ufeffbom",
        '"',
        "'",
        "\x85",
        "\u2028",
    ]
)


@quick
@given(
    captions=st.lists(cells, min_size=1, max_size=6),
    separator=st.sampled_from(["\t", ",", ";", "|"]),
    # A carriage return inside a cell is only quoted by Python's own writer when it is part of the line end.
    form=st.sampled_from(
        [("\n", csv.QUOTE_ALL), ("\r", csv.QUOTE_ALL), ("\r\n", csv.QUOTE_ALL), ("\r\n", csv.QUOTE_MINIMAL)]
    ),
    mark=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_csv_round_trip(
    tmp_path: Path, captions: list[str], separator: str, form: tuple[str, int], mark: str
) -> None:
    """Captions with quotes, commas, line breaks or Vietnamese would be changed, cut or lost."""
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=separator, lineterminator=form[0], quoting=form[1])
    writer.writerows([("filepath", "title"), *((f"{i}.jpg", caption) for i, caption in enumerate(captions))])
    path = written(tmp_path / "t.csv", file.getvalue().encode(mark))
    expected = [(f"{i}.jpg", caption.strip()) for i, caption in enumerate(captions)]
    assert good(read_table(path)) == expected
    assert (
        good(read_table(path, csv_separator=separator, csv_img_key="filepath", csv_caption_key="title"))
        == expected
    )


@quick
@given(captions=st.lists(cells | st.lists(cells, min_size=1, max_size=3), min_size=1, max_size=6))
def test_jsonl_and_parquet_round_trip(tmp_path: Path, captions: list[str | list[str]]) -> None:
    """The same captions would differ between file kinds."""
    expected = []
    lists = [caption if isinstance(caption, list) else [caption] for caption in captions]
    for i, texts in enumerate(lists):
        expected += [(f"{i}.jpg", text.strip()) for text in texts]
    lines = [
        json.dumps({"image": f"{i}.jpg", "caption": c}, ensure_ascii=i % 2 == 0)
        for i, c in enumerate(captions)
    ]
    assert good(read_table(written(tmp_path / "t.jsonl", "\n".join(lines)))) == expected
    columns = {"image": [f"{i}.jpg" for i in range(len(lists))], "caption": lists}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    assert good(read_table(tmp_path / "t.parquet")) == expected


@pytest.mark.parametrize(
    ("header", "separator"),
    [
        ("image,caption", ","),
        ("file_name;text", ";"),
        ("path|sentence", "|"),
        ("Image\tCaption", "\t"),
        ("filename,captions", ","),
        ("img,title", ","),
    ],
)
def test_usual_headers_are_guessed_and_said(tmp_path: Path, header: str, separator: str) -> None:
    """A hurried first try would end in an error, or in silence about which columns were taken."""
    extra = f"id{separator}{header}{separator}split"
    path = written(tmp_path / "t.csv", f"{extra}\n{separator.join(['1', 'a.jpg', 'một', 'train'])}\n")
    table = read_table(path)
    assert good(table) == [("a.jpg", "một")]
    image, caption = header.split(separator)
    said = " ".join(table.notes)
    assert (image == "filepath") or f'"{image}"' in said
    assert (caption == "title") or f'"{caption}"' in said
    assert (f'`csv_separator` "{separator}"' in said) == (separator != "\t")


def test_defaults_win_over_usual_names(tmp_path: Path) -> None:
    """open_clip's columns would lose to a column that merely sounds right."""
    path = written(tmp_path / "t.csv", "image\tcaption\tfilepath\ttitle\nx\ty\ta.jpg\tdog\n")
    assert good(read_table(path)) == [("a.jpg", "dog")]


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.parquet"])
@pytest.mark.parametrize(
    ("keys", "flag", "near"),
    [
        ({"csv_img_key": "imge"}, "`csv_img_key`", 'did you mean "image"?'),
        ({"csv_caption_key": "captoin"}, "`csv_caption_key`", 'did you mean "caption"?'),
        ({"csv_caption_key": "zzz"}, "`csv_caption_key`", "name the right one with `csv_caption_key`"),
    ],
)
def test_named_column_that_is_not_there(
    tmp_path: Path, name: str, keys: dict[str, str], flag: str, near: str
) -> None:
    """A typing error in a flag would be answered with another column, or without a hint."""
    path = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.table({"image": ["a.jpg"], "caption": ["x"]}), path)
    else:
        written(
            path, "image,caption\na.jpg,x\n" if name.endswith("csv") else '{"image": "a.jpg", "caption": "x"}'
        )
    with pytest.raises(DataError) as error:
        read_table(path, **keys)
    message = one_line(error)
    assert str(path) in message
    assert flag in message
    assert f'"{next(iter(keys.values()))}"' in message
    assert '"image", "caption"' in message
    assert near in message


def test_file_without_header(tmp_path: Path) -> None:
    """The first pair would be taken for a header, or be lost; or advice be printed that fails."""
    table = read_table(written(tmp_path / "t.csv", "a.jpg,a dog\nb.jpg,a cat\n"))
    assert good(table) == [("a.jpg", "a dog"), ("b.jpg", "a cat")]
    assert "no header line: images from column 1, captions from 2" in table.notes[0]
    path = written(tmp_path / "u.csv", "7,a.jpg,a dog\n8,b.jpg,a cat\n")
    with pytest.raises(DataError, match="numbers from 1: `csv_img_key='1'` `csv_caption_key='2'`"):
        read_table(path)
    assert good(read_table(path, csv_img_key="2", csv_caption_key="3")) == [
        ("a.jpg", "a dog"),
        ("b.jpg", "a cat"),
    ]
    path = written(tmp_path / "v.csv", "id,words\n8,a cat\n")
    table = read_table(path, csv_img_key="1", csv_caption_key="2")
    assert good(table) == [("8", "a cat")]
    assert "is taken for a header" in table.notes[0]


def test_wrong_separator_says_so(tmp_path: Path) -> None:
    """A file read as one column would only complain of a missing column."""
    path = written(tmp_path / "t.csv", "image,caption\na.jpg,a dog\n")
    with pytest.raises(DataError, match="`csv_separator`"):
        read_table(path, csv_separator=";")


def test_backslash_t_is_a_tab(tmp_path: Path) -> None:
    """`--csv-separator "\\t"`, as typed for open_clip, would be two characters."""
    path = written(tmp_path / "t.csv", "filepath\ttitle\na.jpg\tdog\n")
    assert good(read_table(path, csv_separator="\\t")) == [("a.jpg", "dog")]


@pytest.mark.parametrize("separator", ["", "||", '"', "\n"])
def test_impossible_separator(tmp_path: Path, separator: str) -> None:
    """A separator that no CSV reader takes would end in a traceback."""
    path = written(tmp_path / "t.csv", "filepath\ttitle\na.jpg\tdog\n")
    with pytest.raises(ConfigError, match=r"csv_separator(` must be one character|: got '')"):
        read_table(path, csv_separator=separator)


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_bytes_that_are_not_utf8(tmp_path: Path, name: str) -> None:
    """A file saved by an old Excel would end in a UnicodeDecodeError, or in captions of question marks."""
    row = "b.jpg\tcà phê\n" if name.endswith("csv") else '{"image": "b.jpg", "caption": "cà phê"}\n'
    head = "filepath\ttitle\n" if name.endswith("csv") else '{"image": "a.jpg", "caption": "x"}\n'
    path = written(tmp_path / name, head.encode() + b"\n" * 5000 + row.encode("latin-1"))
    with pytest.raises(DataError) as error:
        list(read_table(path).rows())
    message = one_line(error)
    assert "line 5002" in message
    assert "0xe0" in message
    assert "UTF-8" in message


def test_binary_file_is_refused(tmp_path: Path) -> None:
    """A spreadsheet renamed to .csv, or UTF-16 without its mark, would be read as nonsense."""
    for content, what in (
        (b"PK\x03\x04\0\0", "an Excel workbook or a ZIP: give it the suffix .xlsx, or unpack it"),
        (b"a\0b", "no UTF-8 text file; save the table as CSV UTF-8"),
        (b"\x1f\x8b\x08", "compressed with gzip: unpack it first"),
    ):
        with pytest.raises(DataError, match=what):
            read_table(written(tmp_path / "t.csv", content))


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-16", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("name", ["t.tsv", "t.jsonl"])
def test_encodings_that_show_in_the_bytes(tmp_path: Path, encoding: str, name: str) -> None:
    """Excel's "Unicode text", with or without its mark, would be refused."""
    text = f"filepath\ttitle\na.jpg\t{VIETNAMESE}\n"
    if name == "t.jsonl":
        text = json.dumps({"filepath": "a.jpg", "title": VIETNAMESE}, ensure_ascii=False)
    path = written(tmp_path / name, text.encode(encoding))
    assert good(read_table(path)) == [("a.jpg", VIETNAMESE)]


@pytest.mark.parametrize(
    ("encoding", "words"),
    [
        ("cp1252", "São Paulo à noite, não é maçã; ñandú"),
        ("cp1252", "un café près de la mer"),
        ("cp1251", "красный мяч"),
        ("cp1250", "żółty kwiat"),
        ("cp1253", "μια κόκκινη μπάλα"),
        ("gb18030", "草地上有一个红色的球"),
        ("gb18030", "草地上有一个红色的球" * 1000),
    ],
)
def test_the_offered_encoding_gives_back_what_was_typed(tmp_path: Path, encoding: str, words: str) -> None:
    """Who follows the advice would train on Săo for São: a guess in place of the readings to choose from."""
    path = written(tmp_path / "t.tsv", f"filepath\ttitle\na.jpg\t{words}\n".encode(encoding))
    with pytest.raises(DataError) as error:
        list(read_table(path).rows())
    offered = dict(re.findall(r"(\w+) reads “(.*?)”", one_line(error)))
    assert "iconv" not in str(error.value)
    assert encoding in offered
    assert words[:10] in offered[encoding]
    assert good(open_table(path, TableArgs(csv_encoding=encoding))) == [("a.jpg", words)]


def test_unknown_encoding(tmp_path: Path) -> None:
    """A typing error in `csv_encoding` would end in a LookupError."""
    path = written(tmp_path / "t.tsv", "filepath\ttitle\na.jpg\tx\n")
    for name in ("latin-99", "hex"):
        with pytest.raises(ConfigError, match="no such encoding"):
            open_table(path, TableArgs(csv_encoding=name))


def test_tsv_that_was_written_without_quoting(tmp_path: Path) -> None:
    """A caption that opens with a quote swallowed the rows up to the next quote, silently."""
    rows = ["filepath\ttitle", "1.jpg\tone", '2.jpg\t"Stop', "3.jpg\tthree", '4.jpg\t6 inches wide"']
    path = written(tmp_path / "t.tsv", "\n".join(rows))
    table = read_table(path)
    assert good(table) == [
        ("1.jpg", "one"),
        ("2.jpg", '"Stop'),
        ("3.jpg", "three"),
        ("4.jpg", '6 inches wide"'),
    ]
    assert "it was written without quoting, and is read so (`csv_quoting='none'`)" in table.notes
    forced = open_table(path, TableArgs(csv_quoting="minimal"))
    assert len(list(forced.rows())) == 2
    with pytest.raises(ConfigError, match="csv_quoting: got 'some', allowed is one of"):
        TableArgs(csv_quoting="some")


def test_captions_of_several_lines_are_said(tmp_path: Path) -> None:
    """Rows that a quote joined could not be told from captions that are meant to have two lines."""
    path = written(tmp_path / "t.csv", 'image,caption\n1.jpg,"a\nb, c"\n2.jpg,two\n')
    first, second = read_table(path).rows()
    assert isinstance(first, Row)
    assert (first.texts, "hold line breaks" in first.remark) == (("a\nb, c",), True)
    assert second == Row(4, "2.jpg", ("two",))


def test_excel_names_its_separator(tmp_path: Path) -> None:
    """Excel's own first line, sep=;, would be taken for the header."""
    table = read_table(written(tmp_path / "t.csv", "\ufeffsep=;\r\nimage;caption\r\na.jpg;one, two\r\n"))
    assert good(table) == [("a.jpg", "one, two")]
    assert "sep=" in table.notes[0]


def test_several_caption_columns(tmp_path: Path) -> None:
    """Five captions in five columns: four of them could not be named."""
    path = written(tmp_path / "t.csv", "image,caption_0,caption_1,b\n1.jpg,one,uno,x\n2.jpg,two,,y\n")
    assert good(read_table(path)) == [("1.jpg", "one"), ("1.jpg", "uno"), ("2.jpg", "two"), ("2.jpg", "")]
    assert '`csv_caption_key` "caption_0,caption_1"' in read_table(path).notes[0]
    named = read_table(path, csv_img_key="image", csv_caption_key="caption_1, b")
    assert good(named)[:2] == [("1.jpg", "uno"), ("1.jpg", "x")]
    with pytest.raises(DataError, match='no column "caption_9"'):
        read_table(path, csv_caption_key="caption_0,caption_9")
    pq.write_table(
        pa.table({"image": ["1.jpg"], "a": ["one"], "b": [["two", "three"]]}), tmp_path / "t.parquet"
    )
    table = read_table(tmp_path / "t.parquet", csv_caption_key="a,b")
    assert [caption for _, caption in good(table)] == ["one", "two", "three"]


def test_one_column_of_two_with_the_same_name(tmp_path: Path) -> None:
    """Which of two columns of one name was read would not be said."""
    table = read_table(written(tmp_path / "t.csv", "image,caption,caption\n1.jpg,one,uno\n"))
    assert good(table) == [("1.jpg", "one")]
    assert any("stands there 2 times" in note for note in table.notes)


def test_null_captions(tmp_path: Path) -> None:
    """Captions `nan`, which pandas writes for empty cells, would be trained on as words."""
    words = ["nan", "NaN", "None", "null", "N/A", "<NA>", "NA", "na", "nan bread"]
    lines = [f"{i}.jpg\t{text}" for i, text in enumerate(words)]
    path = written(tmp_path / "t.tsv", "\n".join(["filepath\ttitle", *lines]))
    assert [caption for _, caption in good(read_table(path)) if caption] == ["na", "nan bread"]
    kept = open_table(path, TableArgs(keep_nulls=True))
    assert [caption for _, caption in good(kept)] == words
    lines = ['{"image": "a.jpg", "caption": NaN}', '{"image": "b.jpg", "caption": "b"}']
    first, _ = read_table(written(tmp_path / "t.jsonl", "\n".join(lines))).rows()
    assert first == Row(1, "a.jpg", ("",), 1)


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.txt", "t.jsonl"])
@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf", b"\r\n\r\n"])
def test_empty_file(tmp_path: Path, name: str, content: bytes) -> None:
    """An empty export would end in an IndexError."""
    with pytest.raises(DataError, match="the file is empty"):
        read_table(written(tmp_path / name, content))


def test_damaged_rows_cost_only_themselves(tmp_path: Path) -> None:
    """One wrong quote would swallow the rows after it, or end the run."""
    lines = [
        "filepath,title",
        "1.jpg,one",
        '2.jpg,"opened and never closed',
        "3.jpg,three",
        '4.jpg,"a "quoted" word"',
        "5.jpg,five",
        "6.jpg",
        "7.jpg,seven, with a comma",
        "8.jpg,eight,",
        "9.jpg,nul\0byte",
        ",no path",
        "",
        ",,",
        "14.jpg,fourteen",
    ]
    table = read_table(written(tmp_path / "t.csv", "\r\n".join(lines)), csv_separator=",")
    kept = [row.image for row in table.rows() if isinstance(row, Row)]
    assert kept == ["1.jpg", "3.jpg", "5.jpg", "7.jpg", "8.jpg", "14.jpg"]
    remarks = {row.image: row.remark for row in table.rows() if isinstance(row, Row)}
    assert "those are the end of the caption" in remarks["7.jpg"]
    reasons = dict(bad(table))
    assert list(reasons) == [3, 5, 7, 10, 11]
    assert "quot" in reasons[3]
    assert 'twice ("")' in reasons[5]
    assert reasons[7].startswith("has 1 cells where the header has 2")
    assert reasons[10] == "holds a NUL byte"
    assert reasons[11] == "no image path"


def test_quote_that_is_never_closed_in_a_long_file(tmp_path: Path) -> None:
    """A single forgotten quote would hide thousands of rows, or trip over the csv module's cell limit."""
    rows = [f"{i}.jpg\t{'«' if i != 3 else chr(34)}caption {i} {'x' * 60}" for i in range(5000)]
    path = written(tmp_path / "t.tsv", "\n".join(["filepath\ttitle", *rows]))
    assert len(good(read_table(path))) == 5000
    table = open_table(path, TableArgs(csv_quoting="minimal"))
    assert bad(table) == [
        (5, f"a cell is longer than {csv.field_size_limit():,} characters: a double quote is never closed")
    ]
    assert sum(isinstance(row, Row) for row in table.rows()) == 4999


def test_line_numbers_count_lines_of_the_file(tmp_path: Path) -> None:
    """The user would be sent to the wrong line after a caption of two lines."""
    path = written(tmp_path / "t.tsv", 'filepath\ttitle\na.jpg\t"two\nlines"\n\nb.jpg\n')
    assert [number for number, _ in bad(read_table(path))] == [5]


def test_jsonl_bad_lines(tmp_path: Path) -> None:
    """One broken line would end the run, or be passed to the tokenizer as a number."""
    lines = [
        '{"filepath": "1.jpg", "title": "one"}',
        '{"filepath": "2.jpg", "title": ',
        '["3.jpg", "three"]',
        '{"filepath": "4.jpg", "title": 4}',
        '{"filepath": 5, "title": "five"}',
        '{"title": "six"}',
        '{"filepath": "7.jpg"}',
        '{"filepath": "8.jpg", "title": "half \\ud83d"}',
        '{"filepath": "9.jpg", "title": ["nine", 9]}',
        "[" * 100_000,
        '{"filepath": "11.jpg", "title": ' + "1" * 5000 + "}",
    ]
    table = read_table(written(tmp_path / "t.jsonl", "\n".join(lines)))
    assert [(row.image, row.texts) for row in table.rows() if isinstance(row, Row)] == [
        ("1.jpg", ("one",)),
        ("7.jpg", ("",)),
    ]
    reasons = dict(bad(table))
    assert list(reasons) == [2, 3, 4, 5, 6, 8, 9, 10, 11]
    assert reasons[2].startswith("is not JSON: Expecting value at column")
    assert reasons[3] == "is a JSON list, not an object"
    assert reasons[4] == "the caption is a int, not text"
    assert reasons[5] == "the image is a int, not a path"
    assert reasons[6] == "no image path"
    assert "surrogate" in reasons[8]


def test_json_array_file_is_explained(tmp_path: Path) -> None:
    """A JSON array saved as .jsonl would only say `no rows`; under its own name it is read."""
    entries = [{"image": "a.jpg", "caption": ["x", "y"]}, 3, {"image": "b.jpg", "caption": "z"}]
    table = read_table(written(tmp_path / "t.json", json.dumps(entries, indent=1)))
    assert [row.texts for row in table.rows() if isinstance(row, Row)] == [("x", "y"), ("z",)]
    assert bad(table) == [(2, "is a JSON int, not an object")]
    assert good(read_table(written(tmp_path / "m.json", '{"a.jpg": ["x"], "b.jpg": "y"}'))) == [
        ("a.jpg", "x"),
        ("b.jpg", "y"),
    ]
    lines = '{"image": "a.jpg", "caption": "x"}\n{"image": "b.jpg", "caption": "y"}\n'
    assert len(good(read_table(written(tmp_path / "l.json", lines)))) == 2
    for content, what in (
        ("{", "is not JSON"),
        ('{"x": 1}', "with x, which is no table"),
        ("3", "single JSON"),
    ):
        with pytest.raises(DataError, match=what):
            read_table(written(tmp_path / "t.json", content))
    for content in ('[{"image": "a.jpg"}]', '[\n {"image": "a.jpg",\n  "caption": "x"}\n]'):
        with pytest.raises(DataError, match="each line must be like"):
            read_table(written(tmp_path / "t.jsonl", content))


@pytest.mark.parametrize("content", [b"", b"not parquet at all", b"PAR1" + b"\0" * 100 + b"PAR1"])
def test_damaged_parquet(tmp_path: Path, content: bytes) -> None:
    """A half-written Parquet file would end in pyarrow's own traceback."""
    with pytest.raises(DataError, match="not a whole Parquet file") as error:
        read_table(written(tmp_path / "t.parquet", content))
    one_line(error)


def test_parquet_damaged_in_the_middle(tmp_path: Path) -> None:
    """Damage behind a whole footer would end in pyarrow's own traceback."""
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"image": [f"{i}.jpg" for i in range(500)], "caption": ["x"] * 500}), path)
    data = bytearray(path.read_bytes())
    data[4:60] = b"\xff" * 56
    written(path, bytes(data))
    with pytest.raises(DataError, match="damaged after row") as error:
        list(read_table(path).rows())
    one_line(error)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extra installed, the user would see an ImportError instead of what to install."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install 'clipgraft\[parquet\]'"):
        read_table(written(tmp_path / "t.parquet", b""))


def test_unknown_sources(tmp_path: Path) -> None:
    """A wrong path or type would end in a traceback without a hint."""
    written(tmp_path / "train.csv", "filepath\ttitle\n")
    for name, content in {"shard.tar": "", "t.numbers": "PK", "t.dat": "a b", "t.bin": "a\0b"}.items():
        written(tmp_path / name, content)
    cases = [
        ("trian.csv", "auto", 'did you mean "train.csv"'),
        ("nowhere/train.csv", "auto", "there is no folder"),
        ("shard.tar.gz", "auto", "a compressed tar file"),
        ("shard-{00..99}.tar", "auto", "shard-00.tar: not found"),
        ("t.numbers", "auto", "a spreadsheet: open it in the spreadsheet program and save it as CSV UTF-8"),
        ("t.dat", "auto", "if it is a text table, say so with `dataset_type='csv'`"),
        ("t.bin", "auto", "is no text, and no table that is read"),
        ("train.csv", "folder", "is a file"),
        (".", "csv", "is a folder"),
        ("train.csv", "webdatasets", "dataset_type: got 'webdatasets', allowed is one of 'auto', 'csv'"),
        ("train.csv", "webdataset", "is no tar file"),
    ]
    for name, kind, message in cases:
        with pytest.raises(ClipgraftError, match=message) as error:
            read_table(tmp_path / name, dataset_type=kind)
        one_line(error)


def folder_of(tmp_path: Path, *names: str) -> Path:
    """A folder with a tiny image under each name."""
    for i, name in enumerate(names):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (i, 0, 0)).save(path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.jsonl", '{"file_name": "a.png", "text": "một"}\n{"file_name": "a.png", "text": "hai"}'),
        ("metadata.csv", "file_name,text\na.png,một\na.png,hai\n"),
        ("captions.txt", "image,caption\na.png,một\na.png,hai\n"),
        ("captions.tsv", "filepath\ttitle\na.png\tmột\na.png\thai\n"),
        ("captions.csv", "filepath,title\na.png,một\na.png,hai\n"),
        ("captions.txt", "a.png#0\tmột\na.png#1\thai\n"),
        ("Flickr8k.token.txt", "a.png#0\tmột\na.png#1\thai\n"),
        ("results.csv", "image_name| comment_number| comment\na.png| 0| một\na.png| 1| hai\n"),
    ],
)
def test_folder_with_a_captions_file(tmp_path: Path, name: str, content: str) -> None:
    """Flickr8k, Flickr30k or a Hugging Face image folder would first have to be converted."""
    folder = folder_of(tmp_path, "a.png")
    written(folder / name, content)
    table = read_table(folder)
    assert good(table) == [("a.png", "một"), ("a.png", "hai")]
    assert any(name in note for note in table.notes)


def test_token_file_keeps_quotes(tmp_path: Path) -> None:
    """Flickr's unquoted captions that begin with a quote would be swallowed."""
    path = written(tmp_path / "Flickr8k.token.txt", 'a.jpg#0\t"Go" , says a sign\r\nb.jpg#12\tb\nnonsense\n')
    table = read_table(path)
    assert [row for row in table.rows() if isinstance(row, Row)] == [
        Row(1, "a.jpg", ('"Go" , says a sign',)),
        Row(2, "b.jpg", ("b",)),
    ]
    assert [number for number, _ in bad(table)] == [3]


def test_images_in_a_sub_folder(tmp_path: Path) -> None:
    """Flickr8k as it is downloaded (captions.txt beside Images/) would report every image missing."""
    folder = folder_of(tmp_path, "Images/a.png", "other/b.png")
    written(folder / "captions.txt", "image,caption\na.png,one\n")
    pairs = read_pairs(folder)
    report = pairs.report
    assert pairs.images == (folder / "Images/a.png",)
    assert "1 images are not where the table says, but in Images/: a.png is Images/a.png" in report.notes
    assert read_pairs(folder / "captions.txt") == pairs


def test_second_captions_file_is_mentioned(tmp_path: Path) -> None:
    """A user who edits the file that is not read would never learn why nothing changes."""
    folder = folder_of(tmp_path, "a.png")
    for name in ("captions.txt", "results.csv"):
        written(folder / name, "image,caption\na.png,one\n")
    assert any("not read: results.csv" in note for note in read_table(folder).notes)


def test_text_file_beside_each_image(tmp_path: Path) -> None:
    """Folders made for diffusion training (a.jpg, a.txt) could not be used."""
    folder = folder_of(tmp_path, "b.png", "sub/a.PNG", "c.png", ".hidden/d.png")
    written(folder / "b.txt", b"\xef\xbb\xbfm\xe1\xbb\x99t\r\n\r\nhai\r\n")
    written(folder / "sub/a.txt", "ba")
    table = read_table(folder)
    assert list(table.rows()) == [
        Row(1, "b.png", ("một", "hai")),
        BadRow(2, "c.png", "no text file beside it"),
        Row(3, str(Path("sub/a.PNG")), ("ba",)),
    ]


def test_both_names_of_a_text_file(tmp_path: Path) -> None:
    """Captions in `a.png.txt`, as some tools write them, would be missed; or `a.png` get those of `a.jpg`."""
    folder = folder_of(tmp_path, "a.jpg", "a.png", "b.png")
    written(folder / "a.txt", "both")
    written(folder / "a.png.txt", "its own")
    assert list(read_table(folder).rows())[:2] == [Row(1, "a.jpg", ("both",)), Row(2, "a.png", ("its own",))]


def test_sidecar_that_is_not_utf8_is_one_bad_row(tmp_path: Path) -> None:
    """One badly saved caption file among thousands would end the run."""
    folder = folder_of(tmp_path, "a.png", "b.png")
    written(folder / "a.txt", "phở".encode() + b"\xe0")
    written(folder / "b.txt", "bún")
    first, second = read_table(folder).rows()
    assert isinstance(first, BadRow)
    assert "not valid UTF-8" in first.reason
    assert second == Row(2, "b.png", ("bún",))


def test_folder_without_captions(tmp_path: Path) -> None:
    """A folder that cannot be used would not say which file is expected."""
    with pytest.raises(DataError, match="no images in this folder"):
        read_table(tmp_path)
    folder = folder_of(tmp_path, "a.png")
    with pytest.raises(DataError, match=r"1 images and no captions.*metadata\.jsonl") as error:
        read_table(tmp_path)
    one_line(error)
    written(folder / "styles.csv", "image,caption\na.png,a dog\n")
    with pytest.raises(DataError, match=re.escape(f"name the table with them ({folder / 'styles.csv'})")):
        read_table(folder)
    assert good(read_table(folder / "styles.csv")) == [("a.png", "a dog")]


def open_ini(path: Path, options: TableArgs, wanted: Wanted) -> Table:
    """Sections named after images, with a key for every column: what a new kind of file has to write."""
    parser = configparser.ConfigParser()
    parser.read(path, encoding="utf-8")
    names = ("image", *dict.fromkeys(key for name in parser.sections() for key in parser[name]))
    _, columns = choose_columns(path, [Header(names)], options, wanted)

    def rows() -> Rows:
        for number, name in enumerate(parser.sections(), 1):
            texts = [parser[name].get(names[place]) for place in columns.texts]
            yield make_row(number, name, texts, wanted.cells(options))

    return Table(path, path.parent, "ini", "section", rows, columns.notes, columns.has_texts)


def test_a_new_kind_of_file_is_one_door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kind of file would have to be taught to the readers of captions, labels and texts one by one."""
    monkeypatch.setattr(doors, "DOORS", (*doors.DOORS, Door((), (".ini",), open_ini)))
    folder = folder_of(tmp_path, "a.png", "b.png", "c.png")
    words = (("a.png", "dog"), ("b.png", "cat"))
    sections = [f"[{name}]\ncaption = a {word}\nlabel = {word}" for name, word in words]
    path = written(folder / "photos.ini", "\n".join([*sections, "[lost.png]", "[c.png]\nlabel = cat"]))
    pairs = read_pairs(path)
    assert pairs.captions == (("a dog",), ("a cat",))
    assert pairs.report.reasons == (("image not found", 1), ("empty caption", 1))
    assert pairs.report.summary().splitlines()[0] == f"{path} (ini)"
    labelled = read_labelled(path)
    assert (labelled.classes, labelled.labels) == (("cat", "dog"), (1, 0, 0))
    assert dict(labelled.report.reasons) == {"image not found": 1}
    assert read_texts(path) == ("a dog", "a cat")
    with pytest.raises(DataError, match='`csv_label_key`: no column "breed"'):
        read_labelled(path, csv_label_key="breed")


def test_columns_that_are_not_needed(tmp_path: Path) -> None:
    """A table of images alone could not be encoded, nor one of texts alone be read."""
    images = open_table(written(tmp_path / "i.csv", "id;image\n1;a.jpg\n"), wanted=IMAGES)
    assert (good(images), images.has_texts) == ([("a.jpg", "a.jpg")], False)
    texts = open_table(written(tmp_path / "t.csv", "id,caption\n1,a dog\n"), wanted=TEXTS)
    assert good(texts) == [("a dog", "a dog")]
    both = open_table(written(tmp_path / "b.csv", "image,caption\na.jpg,a dog\n"), wanted=IMAGES)
    assert (good(both), both.has_texts) == ([("a.jpg", "a dog")], True)
    with pytest.raises(DataError, match='`csv_caption_key`: no column "words"'):
        open_table(tmp_path / "i.csv", TableArgs(csv_caption_key="words"), IMAGES)
    with pytest.raises(DataError, match='`csv_caption_key`: no column "title"'):
        open_table(tmp_path / "i.csv", wanted=TEXTS)


FLICKR = {
    "Flickr8k.token.txt": "a.jpg#0\tA child .\na.jpg#1\tTwo , of them .\nb.jpg#0\tA dog .\n",
    "results_20130124.token": "a.jpg#0\tA child .\na.jpg#1\tTwo , of them .\nb.jpg#0\tA dog .\n",
    "captions.txt": 'image,caption\na.jpg,A child .\na.jpg,"Two , of them ."\nb.jpg,A dog .\n',
    "results.csv": (
        "image_name| comment_number| comment\na.jpg| 0| A child .\na.jpg| 1| Two , of them .\n"
        "b.jpg| 0| A dog .\nc.jpg| 4   A dog runs .\n"
    ),
    "flickr_annotations_30k.csv": (
        'raw,split,filename,img_id\n"[""A child ."", ""Two , of them .""]",train,a.jpg,0\n'
        "\"['A dog .']\",test,b.jpg,1\n"
    ),
}


@pytest.mark.parametrize("name", FLICKR)
def test_flickr_in_all_its_shapes(tmp_path: Path, name: str) -> None:
    """Flickr8k or Flickr30k as they are handed on would need a script first."""
    folder_of(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    path = written(tmp_path / name, FLICKR[name])
    options = {"csv_caption_key": "raw"} if "raw" in FLICKR[name] else {}
    pairs = read_pairs(path, **options)
    assert [(image.name, texts) for image, texts in pairs] == [
        ("a.jpg", ("A child .", "Two , of them .")),
        ("b.jpg", ("A dog .",)),
    ]
    if not options:
        assert read_pairs(tmp_path) == pairs, "the folder with that file in it"


def test_lists_in_cells(tmp_path: Path) -> None:
    """Captions with brackets would be taken apart, or a list that is damaged end the run."""
    path = written(tmp_path / "t.csv", "image,caption\na.jpg,\"['x', 'y']\"\nb.jpg,\"['x', y]\"\nc.jpg,[z]\n")
    assert good(read_table(path)) == [("a.jpg", "['x', 'y']"), ("b.jpg", "['x', y]"), ("c.jpg", "[z]")]
    many = "".join(f"{n}.jpg,\"['x', 'y']\"\n" for n in range(5))
    table = read_table(written(tmp_path / "t.csv", f"image,caption\n{many}b.jpg,[z]\nc.jpg,{'[' * 5000}\n"))
    assert [row.texts for row in table.rows() if isinstance(row, Row)][-3:] == [
        ("x", "y"),
        ("[z]",),
        ("[" * 5000,),
    ]
    assert "cells of captions hold lists, each of whose texts is a caption" in table.notes


def test_parts_of_flickr_and_of_a_column(tmp_path: Path) -> None:
    """Test images would be trained on, or the lists of Flickr8k's parts need a script."""
    folder_of(tmp_path, "a.jpg", "b.jpg")
    tokens = written(tmp_path / "Flickr8k.token.txt", FLICKR["Flickr8k.token.txt"])
    written(tmp_path / "Flickr_8k.trainImages.txt", "a.jpg\n")
    written(tmp_path / "Flickr_8k.devImages.txt", "b.jpg\n")
    assert [image.name for image in read_pairs(tokens, split="train").images] == ["a.jpg"]
    assert [image.name for image in read_pairs(tmp_path, split="dev").images] == ["b.jpg"]
    with pytest.raises(DataError, match=r'no part "test"; the parts are: train \(1\), val \(1\); name one'):
        read_pairs(tokens, split="test")
    table = written(tmp_path / "t.csv", "image,caption,split\na.jpg,x,train\nb.jpg,y,test\n")
    pq.write_table(
        pa.table({"image": ["a.jpg", "b.jpg"], "caption": ["x", "y"], "split": ["train", "test"]}),
        tmp_path / "t.parquet",
    )
    for path in (table, tmp_path / "t.parquet"):
        assert read_pairs(path, split="test").captions == (("y",),)
        with pytest.raises(DataError, match=r'no part "tset"; the parts are: .*; did you mean "test"\?'):
            read_pairs(path, split="tset")
    written(table, "image,caption\na.jpg,x\n")
    with pytest.raises(DataError, match="`split` given, but it has no column 'split'; leave it out"):
        read_pairs(table, split="test")
