"""Image files: list those of a folder tree, and find those that a table names."""

from __future__ import annotations

import os
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import NamedTuple

from clipgraft.errors import DataError
from clipgraft.pictures import HEIC_ADVICE, HEIC_SUFFIXES, IMAGE_SUFFIXES
from clipgraft.stored_images import is_image_file

_HIDDEN = "hidden"
_NAMED = 3  # folders or files that are named in one line
_KINDS = 8  # suffixes that are told apart in one line
_DEPTH = 2  # levels of sub-folders that are searched for an image that is not where the table says
_MOST_FOLDERS = 1000


class Unlisted(NamedTuple):
    """A folder that cannot be listed, and why."""

    path: Path
    reason: str


@dataclass
class Listing:
    """Counts of one listing: every file is an image or counted by kind in `other`."""

    images: int = 0
    other: Counter[str] = field(default_factory=Counter)
    hidden_folders: int = 0
    followed: list[str] = field(default_factory=list)
    circular: list[str] = field(default_factory=list)
    unlisted: list[str] = field(default_factory=list)

    def add(self, name: str) -> bool:
        """Count one file; returns whether it is an image by its name."""
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
        """Return a line with the files by kind, whose numbers add up, and one for each thing left out."""
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
    """Yield every image in a folder and below, in no order, with names of folders alone in memory.

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
    """List every image in `folder` and below, known by its suffix, sorted; see `walk_images`."""
    found = walk_images(folder, Listing() if listing is None else listing)
    return sorted(Path(entry.path) for entry in found if not isinstance(entry, Unlisted))


def is_image_name(name: str) -> bool:
    """Tell whether a path or name has the suffix of an image."""
    return PurePath(name).suffix.lower() in IMAGE_SUFFIXES


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


class ImageFinder:
    """Finds the images that a table names; each name is looked for once.

    Windows separators are understood everywhere. Accented names match whether they are stored composed (NFC)
    or decomposed (NFD): macOS and zip archives change one into the other, and a table keeps what it was
    written with. Paths are normalised (`a/../b.jpg` is `b.jpg`) so that one image is not counted as two.

    A relative path that is not there is looked for with the suffix of an image, in other case, and in
    sub-folders. A single file of that name is taken, and counted in `notes`; of several none is.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, Path | str] = {}
        self._files: dict[str, list[str]] | None = None
        self._stems: dict[str, list[str]] | None = None
        self._elsewhere: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def find(self, text: str) -> Path | str:
        """Find the image file that `text` names; where there is none, return the reason in a few words."""
        if text not in self._known:
            self._known[text] = self._look(text)
        return self._known[text]

    def notes(self) -> tuple[str, ...]:
        """Say how many images were found elsewhere than the table says, and how."""
        return tuple(
            f"{count:,} images are not where the table says, but {how}: {self._first[how]}"
            for how, count in self._elsewhere.most_common()
        )

    def _look(self, text: str) -> Path | str:
        try:
            for spelling in _spellings(text):
                # Half the time of `self._folder / spelling`, for tables of a million images.
                path = os.path.normpath(os.path.join(self._folder, spelling))  # noqa: PTH118
                if is_image_file(path):
                    return Path(path)
        except (tarfile.TarError, DataError) as error:
            return f"the file that holds it cannot be read: {error}"
        except (OSError, ValueError) as error:
            return f"the path cannot be read: {error.strerror if isinstance(error, OSError) else error}"
        found = self._search(text) if _is_relative(text) else []
        if len(found) == 1:
            return self._taken(text, found[0])
        if len(found) > 1:
            names = ", ".join(sorted(found)[:_NAMED]) + (", ..." if len(found) > _NAMED else "")
            return f"may be one of {len(found)} files: {names}; write which, or give `image_root`"
        return _why_missing(self._folder, text)

    def _taken(self, text: str, found: str) -> Path:
        written, there = PurePosixPath(text.replace("\\", "/")), PurePosixPath(found)
        how = []
        if len(there.parts) > len(written.parts) and str(there.parent) != ".":
            how.append(f"in {there.parent}/")
        if not is_image_name(written.name):
            how.append(f"with {there.suffix}")
        elif unicodedata.normalize("NFC", there.name) != unicodedata.normalize("NFC", written.name):
            how.append("in other case")
        key = " and ".join(how) or "in other spelling"
        self._elsewhere[key] += 1
        self._first.setdefault(key, f"{text} is {found}")
        return Path(os.path.normpath(self._folder / found))

    def _search(self, text: str) -> list[str]:
        """List files below the folder that `text` may mean, relative to it, nearest place first."""
        wanted = PurePosixPath(_folded(text.replace("\\", "/")))
        if self._files is None:
            self._files = _index(self._folder)
        if wanted.name in ("", "..") or ".." in wanted.parts:
            return []
        found = self._files.get(wanted.name, [])
        if not found and not is_image_name(wanted.name):
            if self._stems is None:
                self._stems = {}
                for files in self._files.values():
                    for file in files:
                        self._stems.setdefault(_folded(PurePosixPath(file).stem), []).append(file)
            found = self._stems.get(wanted.name, [])
        tail = wanted.parent.parts
        fitting = [
            file
            for file in found
            if not tail or PurePosixPath(_folded(file)).parent.parts[-len(tail) :] == tail
        ]
        near = [file for file in fitting if file.count("/") == len(tail)]
        return near or fitting


def _index(folder: Path) -> dict[str, list[str]]:
    """Map case-folded file names to the images of that name, in a folder and its nearer sub-folders."""
    found: dict[str, list[str]] = {}
    waiting, looked_in = [(folder, "")], 0
    while waiting and looked_in < _MOST_FOLDERS:
        place, prefix = waiting.pop(0)
        looked_in += 1
        try:
            with os.scandir(place) as entries:
                for entry in entries:
                    if entry.name.startswith((".", "__MACOSX")):
                        continue
                    if is_image_name(entry.name):
                        found.setdefault(_folded(entry.name), []).append(prefix + entry.name)
                    elif prefix.count("/") < _DEPTH and entry.is_dir():
                        waiting.append((place / entry.name, f"{prefix}{entry.name}/"))
        except OSError:  # what cannot be listed holds nothing that could be read
            continue
    return found


def _folded(name: str) -> str:
    return name.lower() if name.isascii() else unicodedata.normalize("NFC", name).casefold()


def _is_relative(text: str) -> bool:
    return not ("://" in text or Path(text).is_absolute() or PureWindowsPath(text).drive)


def _spellings(text: str) -> Iterator[str]:
    yield text
    forward = text.replace("\\", "/")
    forms = [forward, *(unicodedata.normalize(form, forward) for form in ("NFC", "NFD"))]
    yield from (form for form in dict.fromkeys(forms) if form != text)


def _why_missing(folder: Path, text: str) -> str:
    if "://" in text:
        return "is an address; download the image first"
    if (folder / text).is_dir():
        return "is a folder, not an image"
    if os.name != "nt" and PureWindowsPath(text).drive:
        return "not found: it is a path on a Windows drive; make it relative to the table's folder"
    if Path(text).is_absolute():
        return "not found"
    for other, name in ((Path(), "."), (folder / "..", str(folder / ".."))):
        if (other / text).is_file():
            what = "the working directory" if name == "." else "the folder above"
            return f"not found in {folder}, but in {what}; add `image_root={os.path.normpath(name)!r}`"
    return f"not found in {folder}"
