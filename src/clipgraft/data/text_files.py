"""Tell what a file is by its name and first bytes, and read text files in their own encoding."""

from __future__ import annotations

import codecs
import re
import shlex
import unicodedata
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TextIO

from clipgraft.errors import ConfigError, DataError
from clipgraft.readers import POINTER, is_pointer

_HEAD = 256  # bytes that tell UTF-16 without a mark: of its letters below U+0100, each second byte is 0
_FEWEST_NULS = 4
_SHOWN = 4  # readings of a line that are offered
_CUT = 40  # characters of each
_AROUND = 2_000  # bytes before and after one that cannot be decoded; a line may be the whole file
_USUAL = (
    *("cp1252", "cp1250", "cp1251", "cp1258", "cp1253", "cp1254", "cp1255", "cp1256", "cp874"),
    *("big5", "gb18030", "cp932", "cp949"),
)
_MARKS = frozenset("«»“”‘’–—…¿¡·、。，")
_TOGETHER = frozenset({"CJK", "HIRAGANA", "KATAKANA", "HANGUL"})  # scripts that share words

_SAVE = "open it in the spreadsheet program and save it as CSV UTF-8"
_UNPACK = "unpack it, and name the folder or table that is in it"
_TO_PARQUET = "write it as Parquet, with pandas: table.to_parquet"
_MAGIC = (
    (b"PAR1", "a Parquet file", "give it the suffix .parquet"),
    (b"\x1f\x8b", "compressed with gzip", "unpack it first: gunzip"),
    (b"BZh", "compressed with bzip2", "unpack it first: bunzip2"),
    (b"\xfd7zXZ", "compressed with xz", "unpack it first: unxz"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "unpack it first: unzstd"),
    (b"\xd0\xcf\x11\xe0", "an old Excel workbook", "give it the suffix .xls"),
    (b"ARROW1", "an Arrow file", _TO_PARQUET),
    (b"FEA1", "a Feather file", _TO_PARQUET),
    (
        b"SQLite format 3",
        "an SQLite database",
        "give it the suffix .sqlite, and say what to read with `query`",
    ),
    (b"\x89HDF", "an HDF5 file", _TO_PARQUET),
    (b"\x93NUMPY", "a NumPy array", "name a table of image paths and captions"),
    (b"\xff\xd8\xff", "an image", "name a table of image paths and captions, or the folder of images"),
    (b"\x89PNG", "an image", "name a table of image paths and captions, or the folder of images"),
    (b"%PDF", "a PDF", "name a table of image paths and captions"),
)
_NAMES = (
    ((".numbers",), "a spreadsheet", _SAVE),
    ((".zip", ".7z", ".rar"), "an archive", _UNPACK),
    ((".arrow", ".feather", ".h5", ".hdf5"), "a binary table", _TO_PARQUET),
    ((".pkl", ".pickle", ".pt", ".pth"), "a pickle, which can run code and is never opened", _TO_PARQUET),
    ((".mat", ".npy", ".npz"), "a file of arrays", "name a table of image paths and captions"),
    ((".lmdb", ".mdb", ".tfrecord", ".beton", ".rec"), "a binary data set", "export images and a table"),
    ((".xml", ".html", ".yaml", ".yml"), "a text of another form", "write a CSV with image and caption"),
)
_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def text_encoding(path: Path, given: str | None = None) -> str:
    """Return the given encoding, or the one that a mark or the bytes of the file show; else UTF-8.

    Raises ConfigError where Python knows no such encoding of text.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if given is not None:
        try:
            "a".encode(given)
        except (LookupError, ValueError) as error:
            raise ConfigError(
                f"`csv_encoding` {given}: no such encoding; write one such as cp1252"
            ) from error
        return "utf-8-sig" if codecs.lookup(given).name == "utf-8" else given
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    even, odd = head[::2].count(0), head[1::2].count(0)
    if min(even, odd) == 0 and max(even, odd) >= _FEWEST_NULS and len(head) > _FEWEST_NULS * 2:
        return "utf-16-le" if odd else "utf-16-be"
    return "utf-8-sig"


def text_lines(path: Path, given: str | None = None) -> Generator[str, None, None]:
    """Yield the lines of a text file with their line ends, decoded strictly.

    Raises DataError with the line of the first byte that cannot be decoded.
    """
    if is_pointer(path):
        raise DataError(f"{path}: {POINTER}")
    encoding = text_encoding(path, given)
    with path.open(encoding=encoding, newline="") as file:
        try:
            yield from _refuse_binary(path, file)
        except UnicodeError as error:  # UnicodeDecodeError; UTF-16 and UTF-32 also raise the base
            raise _undecodable(path, encoding, error) from error


def _refuse_binary(path: Path, file: TextIO) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if number == 1 and "\0" in line:
            known = what_it_is(path)
            wrong = f"is {known}" if known else "line 1 holds NUL bytes, so this is no UTF-8 text file; save"
            raise DataError(f"{path}: {wrong}" + ("" if known else " the table as CSV UTF-8"))
        yield line


def _undecodable(path: Path, encoding: str, cause: UnicodeError) -> DataError:
    known = what_it_is(path)
    if known:
        return DataError(f"{path}: is {known}")
    data = path.read_bytes()
    try:
        data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        wrong = f"byte 0x{data[error.start]:02x} on line {line} is not valid {error.encoding.upper()}"
        return DataError(f"{path}: {wrong}; {_advice(data, error.start)}")
    except UnicodeError:
        return DataError(f"{path}: is not valid {encoding.upper()} ({cause}); save the table as CSV UTF-8")
    return DataError(f"{path}: changed while it was read; run again")


def _advice(data: bytes, place: int) -> str:
    """How the line of a byte reads in other encodings. None is named as the right one: only who knows the
    words can tell São from Săo, and detectors guess wrongly in half of such short texts.
    """
    start = data.rfind(b"\n", 0, place) + 1
    end = data.find(b"\n", place)
    end = len(data) if end < 0 else end
    around = slice(max(start, place - _AROUND), min(end, place + _AROUND))
    whole = around == slice(start, end)
    line, start = data[around], around.start
    found: dict[str, str] = {}
    for encoding in _USUAL:
        try:
            data.decode(encoding)
            # A cut may go through a character of several bytes.
            text = unicodedata.normalize("NFC", line.decode(encoding, "strict" if whole else "ignore"))
            before = len(line[: place - start].decode(encoding, "ignore"))
        except (UnicodeDecodeError, LookupError):
            continue
        if _is_words(text):
            shown = text[max(before - _CUT // 2, 0) :].strip()[:_CUT]
            found.setdefault(" ".join(shown.split()), encoding)
    save = "save the table as CSV UTF-8, or give its encoding with `csv_encoding`"
    readings = [f"{encoding} reads “{text}”" for text, encoding in list(found.items())[:_SHOWN]]
    return f"{save}: {', '.join(readings)}; take the one whose words are right" if readings else save


def _is_words(text: str) -> bool:
    """Tell whether text reads as words: letters of one script a word, and Latin words not all accents."""
    accented = plain = 0
    for word in "".join(c if c.isalpha() or unicodedata.combining(c) else " " for c in text).split():
        scripts = {unicodedata.name(c, "?").split()[0] for c in word if c.isalpha()}
        if unicodedata.combining(word[0]):
            return False
        if scripts == {"LATIN"} and not word.isascii():
            accented += sum(not c.isascii() for c in word)
            plain += sum(c.isascii() for c in word)
        if len(scripts - _TOGETHER) + bool(scripts & _TOGETHER) > 1:
            return False
    if accented > 3 * plain:
        return False
    return all(c.isascii() or c.isalpha() or unicodedata.combining(c) or c in _MARKS for c in text)


def is_tar_name(name: str) -> bool:
    """Tell whether a path or pattern names tar files: one, or several by braces or wildcards."""
    return name.lower().rstrip("}").endswith(_ARCHIVES)


def tar_advice(source: str) -> str:
    """Say that tar files are compressed, with the command that unpacks them into ones that are not."""
    kind = source.lower().rstrip("}").rpartition(".")[2]
    command = {"bz2": "bunzip2", "xz": "unxz", "zst": "unzstd"}.get(kind, "gunzip")
    files = source if re.fullmatch(r"[\w./{},*+-]+", source) else shlex.quote(source)
    return (
        "a compressed tar file, in which no image can be read by itself; make it one that is not: "
        f"{command} {files}"
    )


def what_it_is(path: Path) -> str | None:
    """Say what a file is and what to do with it, by its name or first bytes; None where unknown."""
    if is_tar_name(path.name):
        return tar_advice(str(path))
    suffix = path.suffix.lower()
    for suffixes, kind, advice in _NAMES:
        if suffix in suffixes:
            return f"{kind}: {advice}"
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError:
        return None
    for magic, kind, advice in _MAGIC:
        if head.startswith(magic):
            return f"{kind}: {advice}"
    if head.startswith(b"PK\x03\x04"):
        return "an Excel workbook or a ZIP: give it the suffix .xlsx, or unpack it"
    return None


def is_text(path: Path) -> bool:
    """Tell whether a file may be text: it has no NUL byte where text has none."""
    if text_encoding(path).startswith(("utf-16", "utf-32")):
        return True
    with path.open("rb") as file:
        return b"\0" not in file.read(1 << 12)
