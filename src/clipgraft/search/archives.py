"""Tar files in WebDataset's layout: `0001.jpg` and its caption `0001.txt` beside each other.

Only headers and captions are read here; images are read later, at their place in the file. That needs a tar
file that is not compressed, as WebDataset's own are. One at an address is read twice over for it.
"""

from __future__ import annotations

import glob
import os
import re
import tarfile
from collections.abc import Iterator
from functools import partial
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import IO

from clipgraft.data.images import IMAGE_SUFFIXES
from clipgraft.errors import DataError
from clipgraft.readers import Tar
from clipgraft.search.items import Item, Source, is_address, storable, tidy
from clipgraft.search.remote import check_protocol, modified, open_at, open_filesystem, unreachable

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_LIST = re.compile(r"\{([^{}]*,[^{}]*)\}")
_MOST_TEXT = 1 << 20  # bytes of a caption; a longer member is none


def is_archive_pattern(source: str) -> bool:
    """Whether a source names tar files: one, or several by braces or wildcards."""
    return source.rstrip("}").endswith((".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"))


def open_archives(pattern: str) -> Source:
    """The tar files that a pattern names, in its order.

    Raises:
        DataError: there are none, one is missing, or they are compressed.
    """
    if not pattern.rstrip("}").endswith(".tar"):
        raise DataError(
            f"{pattern}: is compressed, so no image in it can be read by itself; unpack it to .tar"
        )
    remote = is_address(pattern)
    whole = pattern if remote else Path(os.path.abspath(pattern)).as_posix()  # noqa: PTH100
    found = [path for name in expand_braces(whole) for path in _matches(name)]
    if not found:
        raise DataError(
            f"{pattern}: no file matches; check the pattern, in quotes where a shell would expand it"
        )
    root = _common_folder(found)
    if remote and not is_address(root):  # a file that lies directly below `memory://`
        root = ""
    return Source(whole, root, False, partial(_members_of_all, root, tuple(dict.fromkeys(found))))


def _common_folder(paths: list[str]) -> str:
    """The folder that all lie in, at whatever depth; `os.path` knows no addresses."""
    columns = zip(*(path.split("/")[:-1] for path in paths), strict=False)
    return "/".join(part[0] for part in takewhile(lambda part: len(set(part)) == 1, columns)) or "/"


def expand_braces(pattern: str) -> list[str]:
    """`a-{08..10}.tar` -> three names, zeros kept; `{a,b}.tar` -> two; combined they multiply."""
    match = _RANGE.search(pattern) or _LIST.search(pattern)
    if match is None:
        return [pattern]
    if match.re is _RANGE:
        first, last = match[1], match[2]
        width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
        step = 1 if int(first) <= int(last) else -1
        parts = [f"{number:0{width}d}" for number in range(int(first), int(last) + step, step)]
    else:
        parts = match[1].split(",")
    return [
        name
        for part in parts
        for name in expand_braces(pattern[: match.start()] + part + pattern[match.end() :])
    ]


def _matches(name: str) -> list[str]:
    """The files of one name, in which wildcards may be left."""
    if is_address(name):
        check_protocol(name.partition("://")[0])
        if not glob.has_magic(name):
            return [name]
        files, path = open_filesystem(name)
        try:
            return sorted(str(files.unstrip_protocol(found)) for found in files.glob(path))
        except Exception as error:  # as in list_images_at: each file system has errors of its own
            raise unreachable(name, error) from error
    if os.path.isfile(name):  # noqa: PTH113 - a name with brackets is no pattern where such a file is
        return [name]
    if not glob.has_magic(name):
        raise DataError(f"{name}: not found; check the path")
    return sorted(glob.glob(name))  # noqa: PTH207


def _members_of_all(root: str, archives: tuple[str, ...]) -> Iterator[Item]:
    for archive in archives:
        key = archive[len(root) :].lstrip("/")
        try:
            with open_at(archive) if is_address(archive) else open(archive, "rb") as file:  # noqa: PTH123
                yield from _members(key, file)
        except (tarfile.TarError, EOFError) as error:
            reason = " ".join(str(error).split())
            wrong = f"the archive is damaged or cut short ({reason})"
            yield Item(key, *_stamp(archive), reason=wrong, unlisted=True)
        except OSError as error:
            yield Item(key, reason=f"the archive cannot be read: {error.strerror or error}", unlisted=True)


def _stamp(archive: str) -> tuple[int | None, int | None]:
    """Size and time of a tar file."""
    if is_address(archive):
        files, path = open_filesystem(archive)
        info = files.info(path)
        return info.get("size"), modified(info)
    status = os.stat(archive)  # noqa: PTH116
    return status.st_size, status.st_mtime_ns // 1000


def _members(archive: str, file: IO[bytes]) -> Iterator[Item]:
    """The images of one tar file, each with the text that stands beside it under the same name."""
    with Tar.open(fileobj=file, mode="r:") as tar:
        sample, images, caption = "", list[tarfile.TarInfo](), None
        for member in _headers(tar):
            if isinstance(member, tarfile.TarError):
                yield from _items(archive, images, caption)
                raise member
            stem = _stem(member.name)
            if stem != sample:
                yield from _items(archive, images, caption)
                sample, images, caption = stem, [], None
            suffix = PurePosixPath(member.name).suffix.lower()
            if member.isfile() and suffix in IMAGE_SUFFIXES:
                images.append(member)
            elif member.isfile() and suffix == ".txt" and member.size <= _MOST_TEXT:
                caption = _text(tar, member)
        yield from _items(archive, images, caption)


def _headers(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo | tarfile.TarError]:
    """The members one by one, none of them kept; last, as a value, what ended the reading too early."""
    try:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]
            yield member
    except tarfile.TarError as error:
        yield error


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str | None:
    content = tar.extractfile(member)
    assert content is not None
    return tidy(content.read().decode(errors="replace"))


def _stem(name: str) -> str:
    """What files of one sample share: everything up to the first dot of the file's name."""
    folder, _, file = name.rpartition("/")
    return f"{folder}/{file.partition('.')[0]}"


def _items(archive: str, images: list[tarfile.TarInfo], caption: str | None) -> Iterator[Item]:
    for member in images:
        key = f"{archive}::{member.name}"
        if storable(key) is None:
            name = key.encode(errors="backslashreplace").decode()
            yield Item(name, reason="the member's name is not UTF-8; rename it")
        else:
            mtime = round(member.mtime * 1e6)
            yield Item(key, member.size, mtime, caption, offset=member.offset_data)
