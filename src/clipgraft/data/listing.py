"""List the images of a folder and all below it, and say what else is there and what was left out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import NamedTuple

from clipgraft.errors import DataError
from clipgraft.pictures import HEIC_ADVICE, HEIC_SUFFIXES, IMAGE_SUFFIXES

_HIDDEN = "hidden"
_NAMED = 3  # folders that are named in one line
_KINDS = 8  # suffixes that are told apart in one line


class Unlisted(NamedTuple):
    """A folder that cannot be listed, and why."""

    path: Path
    reason: str


@dataclass
class Listing:
    """What one listing met: every file is an image or counted by kind in `other`."""

    images: int = 0
    other: Counter[str] = field(default_factory=Counter)
    hidden_folders: int = 0
    followed: list[str] = field(default_factory=list)
    circular: list[str] = field(default_factory=list)
    unlisted: list[str] = field(default_factory=list)

    def add(self, name: str) -> bool:
        """Count one file; True where it is an image by its name."""
        suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122 - a name, of which there may be millions
        if name.startswith("."):
            self.other[_HIDDEN] += 1
        elif suffix in IMAGE_SUFFIXES:
            self.images += 1
            return True
        else:
            self.other[suffix or "without a suffix"] += 1
        return False

    def notes(self) -> tuple[str, ...]:
        """One line with the files by kind, whose numbers add up, and one for each thing that was left out."""
        heic = any(suffix in self.other for suffix in HEIC_SUFFIXES)
        lines = [self._files() + (f" ({HEIC_ADVICE})" if heic else "")]
        for names, what in (
            (self.followed, "linked folders were read too"),
            (self.circular, "links lead to a folder that is listed already or lies above: left out"),
            (self.unlisted, "folders cannot be listed: left out"),
        ):
            if names:
                more = ", ..." if len(names) > _NAMED else ""
                lines.append(f"{len(names):,} {what} ({', '.join(names[:_NAMED])}{more})")
        if self.hidden_folders:
            lines.append(f"{self.hidden_folders:,} hidden folders were left out")
        return tuple(lines)

    def _files(self) -> str:
        kinds = sorted(self.other.items(), key=lambda kind: (-kind[1], kind[0]))[:_KINDS]
        rest = self.other.total() - sum(count for _, count in kinds)
        parts = [f"{self.images:,} images", *(f"{count:,} {kind}" for kind, count in kinds)]
        parts += [f"{rest:,} of other kinds"] if rest else []
        return f"{self.images + self.other.total():,} files: {', '.join(parts)}"


def walk_images(root: Path, listing: Listing) -> Iterator[os.DirEntry[str] | Unlisted]:
    """Every image in a folder and below, in no order; holds the names of folders, never those of files.

    Links to folders are followed, after all else, unless they lead to a folder that is listed already or to
    one that `root` lies in. Hidden files and folders are left out. `listing` counts all of it.

    Raises:
        DataError: `root` itself cannot be listed.
    """
    waiting, linked = [root], list[Path]()
    try:
        listed = {_identity(parent) for parent in root.resolve().parents}
    except OSError:
        listed = set()
    while waiting or linked:
        is_link = not waiting
        folder = linked.pop(0) if is_link else waiting.pop()
        name = folder.relative_to(root).as_posix()
        try:
            identity = _identity(folder)
            if identity in listed:
                listing.circular.append(name)
                continue
            listed.add(identity)
            with os.scandir(folder) as entries:
                if is_link:
                    listing.followed.append(f"{name} -> {folder.readlink()}")
                for entry in entries:
                    if not _is_folder(entry):
                        if listing.add(entry.name):
                            yield entry
                    elif entry.name.startswith("."):
                        listing.hidden_folders += 1
                    else:
                        (linked if entry.is_symlink() else waiting).append(folder / entry.name)
        except OSError as error:
            if folder == root:
                raise DataError(f"{root}: cannot be listed ({error.strerror}); check the folder") from error
            listing.unlisted.append(name)
            yield Unlisted(folder, error.strerror or str(error))
        linked.sort()


def list_images(folder: Path, listing: Listing | None = None) -> list[Path]:
    """Every image in `folder` and below, known by its suffix, sorted; see `walk_images`."""
    found = walk_images(folder, Listing() if listing is None else listing)
    return sorted(Path(entry.path) for entry in found if not isinstance(entry, Unlisted))


def is_image_name(name: str) -> bool:
    """Whether a path or name has the suffix of an image."""
    return PurePath(name).suffix.lower() in IMAGE_SUFFIXES


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino
