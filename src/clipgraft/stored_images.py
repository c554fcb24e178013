"""Images that are no files of their own: members of a tar file, cells of a Parquet or Arrow file.

Such an image has a path all the same, at which no file is: `shards/00000.tar/0001.jpg`, or
`data.parquet/image/17`. So pairs, records and worker processes hold paths, whatever they name. What opens an
image, or asks for its size and age, asks here.

A name inside a container is looked up in what this module listed and is never handed to the file system: one
such as `../../x` is written without its dots here, and is found under that name alone. A tar file is listed
once a process, by its headers, and its images are read where they lie. A container that changes is listed
again.
"""

from __future__ import annotations

import errno
import io
import os
import re
import stat
import tarfile
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import IO, Any, NamedTuple, Protocol

from clipgraft.readers import Tar, reading_parquet

_INSIDE = re.compile(r"\.(?:tar|parquet|pq|arrow)(?=[/\\])", re.IGNORECASE)
GROUPS_KEPT = 1 << 28
"""Bytes of Parquet row groups that stay decoded in a process."""
_NOT_THERE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EBADF, errno.ELOOP})
_Stamp = tuple[int, int]


class TarMember(NamedTuple):
    """A file in a tar file.

    Attributes:
        name: as the tar file has it, which may be anything.
        turn: 1, or 2 for the second member of that name.
        size: in bytes.
        offset: where its bytes begin.
        mtime: seconds since 1970.
    """

    name: str
    turn: int
    size: int
    offset: int
    mtime: float


class ImageState(NamedTuple):
    """What tells an image from the one that lay there before.

    Attributes:
        size, mtime_ns: of the file, or of the container, in bytes and nanoseconds since 1970.
        place: of the image in its container.
    """

    size: int
    mtime_ns: int
    place: str = ""


class _Container(Protocol):
    """The images of one file by name."""

    def read(self, name: str) -> bytes | None:
        """The bytes of an image; None where there is none of that name."""

    def holds(self, name: str) -> bool:
        """Whether there is an image of that name."""

    def size(self, name: str) -> int:
        """The bytes of an image that is held."""

    def place(self, name: str) -> str:
        """What tells the place of an image that is held from those of others."""


def is_image_file(path: str) -> bool:
    """Tell whether a path names a file, or an image inside one.

    Raises:
        OSError, ValueError: the path cannot be one, or may not be entered.
        tarfile.TarError, DataError: it leads into a container that cannot be read.
    """
    try:
        return stat.S_ISREG(os.stat(path).st_mode)  # noqa: PTH116 - half the time of Path.is_file
    except OSError as error:
        if error.errno not in _NOT_THERE:
            raise
    found = _split(path)
    return found is not None and _opened(found[0]).holds(found[1])


def read_stored(path: str | Path) -> bytes | None:
    """Read an image inside a container; None where the path is that of a file, or of nothing.

    Raises:
        FileNotFoundError: the container has no such image.
        OSError, tarfile.TarError, DataError: the container cannot be read.
    """
    found = _split(os.fspath(path))
    if found is None:
        return None
    content = _holding(*found).read(found[1])
    return b"" if content is None else content


def open_bytes(path: str | Path) -> IO[bytes]:
    """Open an image, whether it is a file or inside one, for reading. Raises as `read_stored` and `open`."""
    content = read_stored(path)
    return Path(path).open("rb") if content is None else io.BytesIO(content)


def image_state(path: str) -> ImageState:
    """Return what tells an image from one that lay there before. Raises as `read_stored` and `os.stat`."""
    found = _split(path)
    if found is None:
        status = os.stat(path)  # noqa: PTH116 - half the time of Path.stat, for a million files
        return ImageState(status.st_size, status.st_mtime_ns)
    return ImageState(*_stamp(found[0]), _holding(*found).place(found[1]))


def image_bytes(path: str | Path) -> int:
    """Return how many bytes an image has. Raises as `image_state`."""
    found = _split(os.fspath(path))
    return Path(path).stat().st_size if found is None else _holding(*found).size(found[1])


def _holding(container: str, name: str) -> _Container:
    opened = _opened(container)
    if not opened.holds(name):
        raise FileNotFoundError(f"{container} has no {name}")
    return opened


def _split(path: str) -> tuple[str, str] | None:
    """Split a path into a container and a name in it; None where no part of it is a container."""
    for match in _INSIDE.finditer(path):
        container = path[: match.end()]
        if os.path.isfile(container):  # noqa: PTH113
            return container, path[match.end() + 1 :].replace("\\", "/")
    return None


def _stamp(container: str) -> _Stamp:
    status = os.stat(container)  # noqa: PTH116
    return status.st_size, status.st_mtime_ns


_KNOWN: dict[tuple[str, int], tuple[_Stamp, _Container]] = {}
"""Containers by path and process: a file that Parquet is read from is not shared with a forked process."""


def _opened(container: str) -> _Container:
    """Return a container's images, listed anew where the file is another than before."""
    is_tar = container.lower().endswith(".tar")
    key, stamp = (container, 0 if is_tar else os.getpid()), _stamp(container)
    known = _KNOWN.get(key)
    if known is None or known[0] != stamp:
        if is_tar:
            for _ in list_tar(container):
                pass
            known = _KNOWN[key]
        else:
            known = _KNOWN[key] = (stamp, _Cells(container))
    return known[1]


def member_path(archive: str, name: str, turn: int = 1) -> str:
    """Return the path of a member: `ARCHIVE.tar/NAME`, or `ARCHIVE.tar/NAME::2` for the second of a name."""
    return f"{archive}/{plain_name(name)}" + (f"::{turn}" if turn > 1 else "")


def plain_name(name: str) -> str:
    """Write a member's name without what means something in a path: a root, `.`, `..` and empty parts."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    return "/".join("__" if part == ".." else part for part in parts)


@dataclass(frozen=True)
class _Members:
    """The members of a tar file: name -> (offset, size)."""

    archive: str
    places: dict[str, tuple[int, int]]

    def read(self, name: str) -> bytes | None:
        if name not in self.places:
            return None
        offset, size = self.places[name]
        with open(self.archive, "rb") as file:  # noqa: PTH123
            file.seek(offset)
            content = file.read(size)
        if len(content) < size:
            raise OSError(f"image file is truncated: the tar file ends {size - len(content)} bytes too soon")
        return content

    def holds(self, name: str) -> bool:
        return name in self.places

    def size(self, name: str) -> int:
        return self.places[name][1]

    def place(self, name: str) -> str:
        return str(self.places[name])


def list_tar(archive: str) -> Iterator[TarMember]:
    """Yield the files in a local tar file in order; when all are yielded, its images can be opened.

    Folders, links and devices are passed over.

    Raises:
        tarfile.TarError: it is damaged, cut short, or compressed; what comes before can be opened.
        OSError: it cannot be read.
    """
    stamp = _stamp(archive)
    places: dict[str, tuple[int, int]] = {}
    seen: Counter[str] = Counter()
    try:
        with open(archive, "rb") as file:  # noqa: PTH123
            for member in tar_members(file):
                if isinstance(member, TarMember):
                    # Two names may be one when they are plain, as `a` and `./a` are.
                    name = plain_name(member.name)
                    seen[name] += 1
                    member = member._replace(turn=seen[name])
                    places[name if member.turn == 1 else f"{name}::{member.turn}"] = (
                        member.offset,
                        member.size,
                    )
                    yield member
    finally:
        _KNOWN[archive, 0] = (stamp, _Members(archive, places))


def tar_members(file: IO[bytes]) -> Iterator[TarMember | tarfile.TarInfo]:
    """Yield the files in an open tar file, one at a time, and what is none as `TarInfo`.

    Raises tarfile.TarError as `list_tar`, after the members before the damage.
    """
    seen: Counter[str] = Counter()
    with Tar.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]
            if member.isfile():
                seen[member.name] += 1
                yield TarMember(member.name, seen[member.name], member.size, member.offset_data, member.mtime)
            else:
                yield member


class _Cells:
    """Images in the cells of a Parquet or Arrow file, named `COLUMN/ROW`; rows count from 0."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._lock = Lock()
        self._reader: _Groups | None = None
        self._kept: OrderedDict[tuple[str, int], Any] = OrderedDict()

    def read(self, name: str) -> bytes | None:
        found = self._find(name)
        if found is None:
            return None
        column, group, row = found
        return cell_bytes(self._column(column, group)[row].as_py())

    def holds(self, name: str) -> bool:
        return self._find(name) is not None

    def size(self, name: str) -> int:
        return len(self.read(name) or b"")

    def place(self, name: str) -> str:
        return name

    def _find(self, name: str) -> tuple[str, int, int] | None:
        column, _, number = name.rpartition("/")
        groups = self._groups()
        if column not in groups.columns or not (number.isascii() and number.isdecimal()):
            return None
        row = int(number[:20])
        group = bisect_right(groups.ends, row)
        if group == len(groups.ends):
            return None
        return groups.columns[column], group, row - (groups.ends[group - 1] if group else 0)

    def _groups(self) -> _Groups:
        with self._lock:
            if self._reader is None:
                self._reader = open_groups(Path(self._file))
            return self._reader

    def _column(self, column: str, group: int) -> Any:
        """One column of one row group; those that were used last stay decoded."""
        groups = self._groups()
        with self._lock:
            if (column, group) not in self._kept:
                self._kept[column, group] = groups.read(group, column)
                while len(self._kept) > 1 and sum(c.nbytes for c in self._kept.values()) > GROUPS_KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end((column, group))
            return self._kept[column, group]


class _Groups:
    """The row groups of a Parquet file, or the record batches of an Arrow file.

    Attributes:
        columns: names as they stand in a path -> names of the columns.
        ends: rows up to the end of each group.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        with reading_parquet(file, "is not a whole Parquet or Arrow file") as pyarrow:
            if file.suffix.lower() == ".arrow":
                self._batches: Any = arrow_table(pyarrow, file)
                self._parquet: Any = None
                names = self._batches.schema.names
                self._chunks = self._batches.to_batches()
                sizes = [chunk.num_rows for chunk in self._chunks]
            else:
                self._parquet = pyarrow.parquet.ParquetFile(file, memory_map=True)
                names = self._parquet.schema_arrow.names
                meta = self._parquet.metadata
                sizes = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
        self.ends = list(accumulate(sizes))
        self.columns = {plain_name(name): name for name in reversed(names)}

    def read(self, group: int, column: str) -> Any:
        """The cells of one column of one group. Raises DataError where they are damaged."""
        with reading_parquet(self._file, f"damaged in row group {group}"):
            if self._parquet is None:
                return self._chunks[group].column(column)
            # A forked process has none of Arrow's threads.
            table = self._parquet.read_row_group(group, columns=[column], use_threads=False)
            table.validate(full=True)
            return table.column(0)


def open_groups(file: Path) -> _Groups:
    """Open a Parquet or Arrow file for its cells. Raises DataError where it is none, or pyarrow lacks."""
    return _Groups(file)


def arrow_table(pyarrow: Any, file: Path) -> Any:
    """Map an Arrow file as a table, of the stream form that `datasets` writes or the other."""
    import pyarrow.ipc as ipc

    source = pyarrow.memory_map(str(file))
    try:
        table = ipc.open_stream(source).read_all()
    except pyarrow.ArrowInvalid:
        table = ipc.open_file(pyarrow.memory_map(str(file))).read_all()
    table.validate(full=True)
    return table


def cell_bytes(cell: Any) -> bytes | None:
    """Return the image in a cell, bytes or Hugging Face's `{bytes, path}`; None if it has none."""
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    return content if isinstance(content, bytes) else None


def cell_path(table: str, column: str, row: int) -> str:
    """Return the path of the image in a cell: `TABLE.parquet/COLUMN/ROW`, with rows from 0."""
    return f"{table}/{plain_name(column)}/{row}"
