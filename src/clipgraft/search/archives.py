"""Tar files in WebDataset's layout: `0001.jpg` and its caption `0001.txt` beside each other.

Which caption is whose is decided in `clipgraft.data.tar_samples`. Only headers and captions are read here;
images are read later, at their place in the file. That needs a tar file that is not compressed, as
WebDataset's own are. One at an address is read twice over for it.
"""

from __future__ import annotations

import glob
import os
import tarfile
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import IO

from clipgraft.data.table import is_null
from clipgraft.data.tar_samples import Met, TarImage, TarSamples, expand_braces
from clipgraft.errors import DataError
from clipgraft.readers import Tar
from clipgraft.search.items import (
    IN_TAR,
    Item,
    ItemSource,
    check_protocol,
    is_address,
    modified,
    open_at,
    open_filesystem,
    storable,
    tidy,
    unreachable,
)
from clipgraft.stored_images import TarMember, tar_members

_TEXTS = (".txt", ".caption")


def is_archive_pattern(source: str) -> bool:
    """Tell whether a source names tar files: one, or several by braces or wildcards."""
    return source.rstrip("}").endswith((".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"))


def open_archives(pattern: str) -> ItemSource:
    """Open the tar files that a pattern names, in its order.

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
    archives, met = tuple(dict.fromkeys(found)), list[Met]()

    def items() -> Iterator[Item]:
        met[:] = [Met()]
        return _members_of_all(root, archives, met[0])

    return ItemSource(whole, root, False, items, met=lambda: met[0].notes() if met else ())


def _common_folder(paths: list[str]) -> str:
    """Return the deepest folder that contains all paths; `os.path` does not know addresses."""
    columns = zip(*(path.split("/")[:-1] for path in paths), strict=False)
    return "/".join(part[0] for part in takewhile(lambda part: len(set(part)) == 1, columns)) or "/"


def _matches(name: str) -> list[str]:
    """Return the files that match one name, which may have wildcards."""
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


def _members_of_all(root: str, archives: tuple[str, ...], met: Met) -> Iterator[Item]:
    for archive in archives:
        key = archive[len(root) :].lstrip("/")
        try:
            with open_at(archive) if is_address(archive) else open(archive, "rb") as file:  # noqa: PTH123
                yield from _members(key, file, met)
        except (tarfile.TarError, EOFError) as error:
            reason = " ".join(str(error).split())
            wrong = f"the archive is damaged or cut short ({reason})"
            yield Item(key, *_stamp(archive), reason=wrong, unlisted=True)
        except OSError as error:
            yield Item(key, reason=f"the archive cannot be read: {error.strerror or error}", unlisted=True)


def _stamp(archive: str) -> tuple[int | None, int | None]:
    """Return size and modification time of a tar file."""
    if is_address(archive):
        files, path = open_filesystem(archive)
        info = files.info(path)
        return info.get("size"), modified(info)
    status = os.stat(archive)  # noqa: PTH116
    return status.st_size, status.st_mtime_ns // 1000


def _members(archive: str, file: IO[bytes], met: Met) -> Iterator[Item]:
    """Yield the images of one tar file, each with the text beside it of the same name."""

    def read(member: TarMember) -> bytes:
        file.seek(member.offset)
        return file.read(member.size)

    samples = TarSamples(archive, read, dict.fromkeys(_TEXTS, _caption), met)
    for image in samples.of(tar_members(file)):
        yield _item(archive, image)


def _item(archive: str, image: TarImage) -> Item:
    """Make an item of an image."""
    member = image.member
    key = f"{archive}::{member.name}"
    if storable(key) is None:
        name = key.encode(errors="backslashreplace").decode()
        return Item(name, reason="the member's name is not UTF-8; rename it")
    if member.turn > 1:
        key += f"::{member.turn}"
    caption = "\n".join(image.captions) or None
    return Item(key, member.size, round(member.mtime * 1e6), caption, offset=member.offset)


def _caption(text: str) -> list[str] | str:
    found = tidy(text)
    return "empty, or nan and the like" if found is None or is_null(found) else [found]


def read_member(place: str) -> bytes:
    """Read `ARCHIVE.tar::MEMBER`, or `ARCHIVE.tar::MEMBER::2`, the second member of that name.

    Raises:
        DataError: the archive has no such file.
        OSError, tarfile.TarError: it cannot be read.
    """
    archive, _, member = place.partition(IN_TAR)
    name, _, turn = member.rpartition("::")
    wanted = (name, int(turn)) if name and turn.isdecimal() else (member, 1)
    with Tar.open(archive + IN_TAR.removesuffix("::")) as tar:
        seen = 0
        for info in tar:
            seen += info.name == wanted[0]
            if info.name == wanted[0] and seen == wanted[1] and (content := tar.extractfile(info)):
                return content.read()
    raise DataError(f"{place}: is no file in the archive")
