"""From an image path as written in a table to the file on this machine."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from pathlib import Path, PurePosixPath, PureWindowsPath

from clipgraft.data.listing import is_image_name

_DEPTH = 2  # levels of sub-folders that are searched for an image that is not where the table says
_MOST_FOLDERS = 1000
_SHOWN = 3


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
        """The image file that `text` names; where there is none, the reason in a few words."""
        if text not in self._known:
            self._known[text] = self._look(text)
        return self._known[text]

    def notes(self) -> tuple[str, ...]:
        """How many images were found elsewhere than the table says, and how."""
        return tuple(
            f"{count:,} images are not where the table says, but {how}: {self._first[how]}"
            for how, count in self._elsewhere.most_common()
        )

    def _look(self, text: str) -> Path | str:
        try:
            for spelling in _spellings(text):
                path = Path(os.path.normpath(self._folder / spelling))
                if path.is_file():
                    return path
        except (OSError, ValueError) as error:
            return f"the path cannot be read: {error.strerror if isinstance(error, OSError) else error}"
        found = self._search(text) if _is_relative(text) else []
        if len(found) == 1:
            return self._taken(text, found[0])
        if len(found) > 1:
            names = ", ".join(sorted(found)[:_SHOWN]) + (", ..." if len(found) > _SHOWN else "")
            return f"may be one of {len(found)} files: {names}; write which, or give --image-root"
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
        """Files below the folder that `text` may mean, relative to it; those in its own place first."""
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


def find_image(folder: Path, text: str) -> Path | str:
    """The image file that one cell names, as `ImageFinder` finds it."""
    return ImageFinder(folder).find(text)


def _index(folder: Path) -> dict[str, list[str]]:
    """Folded file name -> paths of the images of that name, in a folder and its nearer sub-folders."""
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


def _spellings(text: str) -> list[str]:
    forms = [text, text.replace("\\", "/")]
    forms += [unicodedata.normalize(form, forms[1]) for form in ("NFC", "NFD")]
    return list(dict.fromkeys(forms))


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
            return f"not found in {folder}, but in {what}; add --image-root {os.path.normpath(name)}"
    return f"not found in {folder}"
