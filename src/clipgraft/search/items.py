"""Items of a source (images or texts), and reading their bytes at paths and addresses.

Addresses are those that fsspec knows: s3://, gs://, hf://, memory://, file://.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any, NamedTuple

from clipgraft.data.image_files import Listing
from clipgraft.errors import DataError

IN_TAR = ".tar::"


@dataclass(frozen=True)
class Item:
    """One image or text of a source.

    Attributes:
        key: names it in its source: a path below the source's root, a full path or address outside it,
            `ARCHIVE.tar::MEMBER`, or the text itself.
        bytes, mtime: size and modification time (microseconds since 1970) of the file, as far as listing
            tells them: an item whose size or time is another than before is encoded again.
        caption: of an image, where the source has one; several are joined by newlines.
        reason: why it cannot be used, where listing tells.
        offset: where its bytes begin in its tar file.
        unlisted: it stands for a folder or archive that cannot be listed to its end: what is stored of it
            stays.
    """

    key: str
    bytes: int | None = None
    mtime: int | None = None
    caption: str | None = None
    reason: str | None = None
    offset: int | None = None
    unlisted: bool = False


@dataclass(frozen=True)
class ItemSource:
    """A source of items that can be listed repeatedly, one item at a time.

    Attributes:
        name: as the user would write it, paths made absolute.
        root: folder or address that keys are relative to; empty for texts.
        ordered: whether its own order counts; otherwise items are taken sorted by key.
        items: lists it. An image may be named several times, by every caption it has.
        notes: choices made for the user that they should see.
        met: after it was listed: what it holds besides, and what was left out of it.
    """

    name: str
    root: str
    ordered: bool
    items: Callable[[], Iterator[Item]]
    notes: tuple[str, ...] = ()
    met: Callable[[], tuple[str, ...]] = tuple


class Ref(NamedTuple):
    """The place of an image's bytes: a file or address, or a part of one."""

    location: str
    offset: int | None = None
    size: int | None = None


def is_address(text: str) -> bool:
    """Tell whether fsspec is needed to read it."""
    return "://" in text


def location(root: str, key: str) -> str:
    """Return the path or address of an item; in a tar file it is `ARCHIVE.tar::MEMBER`."""
    if is_address(key) or not root:
        return key
    if is_address(root):
        return f"{root.rstrip('/')}/{key}"
    return os.path.join(root, key)  # noqa: PTH118 - an absolute key stays as it is


def ref(root: str, item: Item) -> Ref:
    """Return the place of an item's bytes."""
    place = location(root, item.key)
    if item.offset is None:
        return Ref(place)
    archive, _, _ = place.partition(IN_TAR)
    return Ref(archive + IN_TAR.removesuffix("::"), item.offset, item.bytes)


def tidy(caption: str) -> str | None:
    """Put a caption on one line, without surrounding blanks; None for an empty one."""
    return " ".join(caption.split()) or None


def storable(text: str) -> str | None:
    """Return text that is valid UTF-8; None where the file system gave other bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return None
    return text


def relative_key(path: Path, root: Path) -> str:
    """Return a path below the root as POSIX text relative to it; any other unchanged."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


_TIMES = ("mtime", "LastModified", "last_modified", "updated", "created")  # as file systems name it


def open_filesystem(address: str) -> tuple[Any, str]:
    """Open the file system of an address; returns it and the path in it.

    Raises:
        DataError: nothing here reads such addresses; names the package that does.
    """
    check_protocol(address.partition("://")[0])
    import fsspec

    return fsspec.core.url_to_fs(address)  # type: ignore[no-any-return]


@functools.cache
def check_protocol(protocol: str) -> None:
    """Raise DataError where fsspec does not know a protocol, or lacks the package for it."""
    import fsspec

    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{protocol}:// cannot be read here ({reason}); pip install that package") from error
    except ValueError as error:
        raise DataError(f"{protocol}://: fsspec knows no such kind of address; check its spelling") from error


def list_images_at(address: str, listing: Listing) -> Iterator[Item]:
    """Yield every image below a folder at an address, by suffix, without hidden ones.

    Raises:
        DataError: there is no such folder, or it cannot be listed.
    """
    files, root = open_filesystem(address)
    prefix = root.rstrip("/") + "/"
    try:
        if not files.isdir(root):
            raise DataError(f"{address}: there is no such folder; check the address")
        for _, folders, found in files.walk(root, detail=True):
            for name in [name for name in folders if name.startswith(".")]:
                del folders[name]
                listing.hidden_folders += 1
            for name, info in found.items():
                if listing.add(name):
                    yield Item(info["name"].removeprefix(prefix), info.get("size"), modified(info))
    except DataError:
        raise
    # Every file system has errors of its own: of the network, of credentials, of permissions.
    except Exception as error:
        raise unreachable(address, error) from error


def modified(info: dict[str, Any]) -> int | None:
    """Return a file's modification time in microseconds since 1970, None if its file system has none."""
    found = next((info[name] for name in _TIMES if info.get(name) is not None), None)
    if isinstance(found, str):
        try:
            found = datetime.fromisoformat(found.replace("Z", "+00:00"))
        except ValueError:
            return None
    if isinstance(found, datetime):
        aware = found if found.tzinfo else found.replace(tzinfo=timezone.utc)
        return round(aware.timestamp() * 1e6)
    return round(found * 1e6) if isinstance(found, int | float) else None


def open_at(address: str) -> IO[bytes]:
    """Open a file at an address for reading, seekable; raises DataError where there is none."""
    files, path = open_filesystem(address)
    try:
        return files.open(path, "rb")  # type: ignore[no-any-return]
    except Exception as error:  # see list_images_at
        raise unreachable(address, error) from error


def read_at(part: Ref) -> bytes:
    """Read a file at an address, or a part of one; raises whatever its file system raises."""
    files, path = open_filesystem(part.location)
    if part.offset is None or part.size is None:
        return files.cat_file(path)  # type: ignore[no-any-return]
    return files.cat_file(path, start=part.offset, end=part.offset + part.size)  # type: ignore[no-any-return]


def unreachable(address: str, error: Exception) -> DataError:
    """Make an error of one line about an address."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return DataError(f"{address}: cannot be read ({reason}); check the address, the network and credentials")


def exists(location: str) -> bool | None:
    """Tell whether there is a file at a path or address; None where that is unknown.

    Raises DataError where nothing here reads such addresses.
    """
    if not is_address(location):
        return os.path.exists(location)  # noqa: PTH110
    try:
        files, path = open_filesystem(location)
        return bool(files.exists(path))
    except DataError:
        raise
    except Exception:  # see list_images_at
        return None
