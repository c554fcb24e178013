"""What sources list: images and texts by a name of their own, and where the bytes of an image are."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

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
class Source:
    """A source that can be listed, every time anew, an item at a time.

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
    """Where the bytes of an image are: a file or address, or a part of one."""

    location: str
    offset: int | None = None
    size: int | None = None


def is_address(text: str) -> bool:
    """Whether fsspec is needed to read it."""
    return "://" in text


def location(root: str, key: str) -> str:
    """The path or address of an item; for one in a tar file `ARCHIVE.tar::MEMBER`."""
    if is_address(key) or not root:
        return key
    if is_address(root):
        return f"{root.rstrip('/')}/{key}"
    return os.path.join(root, key)  # noqa: PTH118 - an absolute key stays as it is


def ref(root: str, item: Item) -> Ref:
    """Where to read an item."""
    place = location(root, item.key)
    if item.offset is None:
        return Ref(place)
    archive, _, _ = place.partition(IN_TAR)
    return Ref(archive + IN_TAR.removesuffix("::"), item.offset, item.bytes)


def tidy(caption: str) -> str | None:
    """A caption on one line, without surrounding blanks; None for an empty one."""
    return " ".join(caption.split()) or None


def storable(text: str) -> str | None:
    """Text that can be kept as UTF-8; None where the file system gave bytes that are none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return None
    return text


def relative_key(path: Path, root: Path) -> str:
    """A path below the root as POSIX text relative to it; any other as it is."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
