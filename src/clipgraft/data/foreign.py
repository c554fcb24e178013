"""Files that are no table of ours: what they are by their first bytes or name, and the way to one."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

_SAVE = "open it in the spreadsheet program and save it as CSV UTF-8"
_UNPACK = "unpack it, and name the folder or table that is in it"
_TO_PARQUET = "write it as Parquet, with pandas: table.to_parquet"
_MAGIC = (
    (b"PAR1", "a Parquet file", "give it the suffix .parquet"),
    (b"\x1f\x8b", "compressed with gzip", "unpack it first: gunzip"),
    (b"BZh", "compressed with bzip2", "unpack it first: bunzip2"),
    (b"\xfd7zXZ", "compressed with xz", "unpack it first: unxz"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "unpack it first: unzstd"),
    (b"\xd0\xcf\x11\xe0", "an old Excel workbook", _SAVE),
    (b"ARROW1", "an Arrow file", _TO_PARQUET),
    (b"FEA1", "a Feather file", _TO_PARQUET),
    (b"SQLite format 3", "an SQLite database", "export the table as CSV UTF-8"),
    (b"\x89HDF", "an HDF5 file", _TO_PARQUET),
    (b"\x93NUMPY", "a NumPy array", "name a table of image paths and captions"),
    (b"\xff\xd8\xff", "an image", "name a table of image paths and captions, or the folder of images"),
    (b"\x89PNG", "an image", "name a table of image paths and captions, or the folder of images"),
    (b"%PDF", "a PDF", "name a table of image paths and captions"),
)
_NAMES = (
    ((".xlsx", ".xlsm", ".xls", ".ods", ".numbers"), "a spreadsheet", _SAVE),
    ((".zip", ".7z", ".rar"), "an archive", _UNPACK),
    ((".arrow", ".feather", ".h5", ".hdf5"), "a binary table", _TO_PARQUET),
    ((".pkl", ".pickle", ".pt", ".pth"), "a pickle, which can run code and is never opened", _TO_PARQUET),
    ((".mat", ".npy", ".npz"), "a file of arrays", "name a table of image paths and captions"),
    ((".db", ".sqlite", ".sqlite3"), "a database", "export the table as CSV UTF-8"),
    ((".lmdb", ".mdb", ".tfrecord", ".beton", ".rec"), "a binary data set", "export images and a table"),
    ((".xml", ".html", ".yaml", ".yml"), "a text of another form", "write a CSV with image and caption"),
)
_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def is_tar_name(name: str) -> bool:
    """Whether a path or pattern names tar files: one, or several by braces or wildcards."""
    return name.lower().rstrip("}").endswith(_ARCHIVES)


def tar_advice(source: str) -> str:
    """What tar files are, and the command that makes of them a folder that is read."""
    name = re.sub(r"[^\w].*", "", Path(source).name.partition("{")[0].partition(".")[0]) or "unpacked"
    files = source if re.fullmatch(r"[\w./{},*+-]+", source) else shlex.quote(source)
    return (
        "a tar file, as of WebDataset, which `clipgraft encode` alone reads as it is; unpack it, name "
        f'the folder: mkdir {name} && for f in {files}; do tar -xf "$f" -C {name}; done'
    )


def what_it_is(path: Path) -> str | None:
    """`a spreadsheet: open it …`, by the file's first bytes, or by its name; None for what is not known."""
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
        return f"an Excel workbook or a ZIP: {_SAVE}, or unpack it"
    return None


def is_text(path: Path) -> bool:
    """Whether a file may be text: it has no NUL byte where text has none."""
    from clipgraft.data.text_files import text_encoding

    if text_encoding(path).startswith(("utf-16", "utf-32")):
        return True
    with path.open("rb") as file:
        return b"\0" not in file.read(1 << 12)
