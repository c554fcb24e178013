"""Tar files in WebDataset's layout: `0001.jpg` and its caption `0001.txt` beside each other.

Which caption is whose is decided in `_Members`. Only headers and captions are read here; images are read
later, at their place in the file. That needs a tar file that is not compressed, as WebDataset's own are. One
at an address is read twice over for it.
"""

from __future__ import annotations

import glob
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import IO

from clipgraft.data.image_files import Listing
from clipgraft.data.table import is_null
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

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_LIST = re.compile(r"\{([^{}]*,[^{}]*)\}")
_TEXTS = (".txt", ".caption")
_TWICE = "of a name that stands there twice, apart from its image"
_MOST_TEXT = 1 << 20  # bytes of a caption; a longer member is none


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
    archives, met = tuple(dict.fromkeys(found)), list[_Met]()

    def items() -> Iterator[Item]:
        met[:] = [_Met()]
        return _members_of_all(root, archives, met[0])

    return ItemSource(whole, root, False, items, met=lambda: met[0].notes() if met else ())


def _common_folder(paths: list[str]) -> str:
    """Return the deepest folder that contains all paths; `os.path` does not know addresses."""
    columns = zip(*(path.split("/")[:-1] for path in paths), strict=False)
    return "/".join(part[0] for part in takewhile(lambda part: len(set(part)) == 1, columns)) or "/"


def expand_braces(pattern: str) -> list[str]:
    """Expand `a-{08..10}.tar` to three names with their zeros, `{a,b}.tar` to two; combinations multiply."""
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


def _members_of_all(root: str, archives: tuple[str, ...], met: _Met) -> Iterator[Item]:
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


@dataclass
class _Sample:
    """Members of an archive with the same name up to the first dot of the file's name.

    Attributes:
        images, texts: each with its member's name.
        by_first_dot: of what a match left: captions that went to images with another name behind that dot.
    """

    name: str
    names: set[str] = field(default_factory=set)
    images: list[tuple[Item, str]] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)
    by_first_dot: int = 0


@dataclass
class _Met:
    """Counts made while archives are listed: members by kind, and captions whose image is uncertain."""

    listing: Listing = field(default_factory=Listing)
    repeated: list[str] = field(default_factory=list)
    apart: int = 0
    by_first_dot: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    first_lost: str = ""

    def lose(self, member: str, why: str, count: int = 1) -> None:
        """Count captions that no image gets."""
        self.lost[why] += count
        self.first_lost = self.first_lost or member

    def notes(self) -> tuple[str, ...]:
        """Return one line for each kind of irregularity."""
        lines = [f"in the archives {line}" for line in self.listing.notes()[:1]]
        if self.repeated:
            lines.append(
                f"{len(self.repeated):,} images have the same name as one before them in their archive: each "
                f"is kept, the second as {self.repeated[0]}, with no caption but that beside it"
            )
        if self.apart:
            lines.append(f"{self.apart:,} captions do not stand beside their images, and were found by name")
        if self.by_first_dot:
            lines.append(
                f"{self.by_first_dot:,} captions were given by WebDataset's rule, to images of the same name "
                "up to the first dot; all others by the name up to the last"
            )
        if self.lost:
            why = ", ".join(f"{count:,} {reason}" for reason, count in self.lost.items())
            lines.append(f"captions left out: {why}; the first is {self.first_lost}")
        return tuple(lines)


def _members(archive: str, file: IO[bytes], met: _Met) -> Iterator[Item]:
    """Yield the images of one tar file, each with the text beside it of the same name."""
    with Tar.open(fileobj=file, mode="r:") as tar:
        members = _Members(archive, tar, met)
        for member in _headers(tar):
            if not isinstance(member, tarfile.TarError):
                try:
                    yield from members.take(member)
                    continue
                except tarfile.TarError as error:
                    member = error
            yield from members.finish()
            raise member
        yield from members.finish()


def _headers(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo | tarfile.TarError]:
    """Yield the members one by one without keeping any; a read error comes last, as a value."""
    try:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]
            yield member
    except tarfile.TarError as error:
        yield error


class _Members:
    """Matches captions to the images of one archive; a caption that may be another's is left out.

    WebDataset's rule is that a sample is what stands together under one name up to the first dot. Others name
    files `im.0.jpg`, `im.0.txt`, for whom the name goes up to the last dot: that match is taken first. Images
    are given out as they come. What has no partner beside it waits for the end of the archive, and a caption
    found there is given out under the image's key.
    """

    def __init__(self, archive: str, tar: tarfile.TarFile, met: _Met) -> None:
        self._archive, self._tar, self._met = archive, tar, met
        self._run: list[_Sample] = []  # several where names repeat
        self._seen: Counter[str] = Counter()
        self._waiting: dict[str, _Sample] = {}

    def take(self, member: tarfile.TarInfo) -> Iterator[Item]:
        """Take in the next member; yields the images of the sample before it, if that has ended."""
        if not member.isfile():
            self._met.listing.other["links"] += member.islnk() or member.issym()
            return
        folder, _, file = member.name.rpartition("/")
        is_image = self._met.listing.add(file)
        is_text = not is_image and not file.startswith(".") and _suffix(file) in _TEXTS
        if not is_image and not is_text:
            return
        name = f"{folder}/{file.partition('.')[0]}"
        if self._run and self._run[-1].name != name:
            yield from self._end_run()
        if not self._run or member.name in self._run[-1].names:
            self._run.append(_Sample(name))
        self._run[-1].names.add(member.name)
        self._seen[member.name] += 1
        if is_image:
            self._run[-1].images.append((self._item(member), member.name))
        elif (text := self._text(member)) is not None:
            self._run[-1].texts.append((member.name, text))

    def finish(self) -> Iterator[Item]:
        """Yield the last sample, and captions for images that do not stand beside them."""
        yield from self._end_run()
        for sample in self._waiting.values():
            if any(self._seen[name] > 1 for name in sample.names):
                self._lose(sample, _TWICE)
                continue
            captions, left = _match(sample)
            self._met.apart += len(sample.texts) - len(left.texts)
            self._met.by_first_dot += left.by_first_dot
            for (item, _), caption in zip(sample.images, captions, strict=True):
                if caption is not None:
                    yield Item(item.key, caption=caption)
            self._lose(left, "without an image")
        self._waiting = {}

    def _end_run(self) -> Iterator[Item]:
        run, self._run = self._run, []
        doubtful = _doubtful(run) if len(run) > 1 else set()
        for sample in run:
            unsure = [text for text in sample.texts if _without_suffix(text[0]) in doubtful]
            self._lose(replace(sample, texts=unsure), _TWICE)
            sample.texts = [text for text in sample.texts if text not in unsure]
            captions, left = _match(sample)
            for (item, member), caption in zip(sample.images, captions, strict=True):
                yield replace(item, caption=caption)
                if caption is None and item.reason is None:
                    self._wait(sample.name, member).images.append((item, member))
            for text in left.texts:
                self._wait(sample.name, text[0]).texts.append(text)
            self._met.by_first_dot += left.by_first_dot

    def _wait(self, name: str, member: str) -> _Sample:
        sample = self._waiting.setdefault(name, _Sample(name))
        sample.names.add(member)
        return sample

    def _lose(self, sample: _Sample, why: str) -> None:
        for member, _ in sample.texts:
            self._met.lose(f"{self._archive}::{member}", why)

    def _item(self, member: tarfile.TarInfo) -> Item:
        key = f"{self._archive}::{member.name}"
        if storable(key) is None:
            name = key.encode(errors="backslashreplace").decode()
            return Item(name, reason="the member's name is not UTF-8; rename it")
        if self._seen[member.name] > 1:
            key += f"::{self._seen[member.name]}"
            self._met.repeated.append(key)
        return Item(key, member.size, round(member.mtime * 1e6), offset=member.offset_data)

    def _text(self, member: tarfile.TarInfo) -> str | None:
        """Return a caption, or None where the member has none, which is counted."""
        where = f"{self._archive}::{member.name}"
        if member.size > _MOST_TEXT:
            self._met.lose(where, f"longer than {_MOST_TEXT >> 20} MiB")
            return None
        content = self._tar.extractfile(member)
        assert content is not None
        try:
            text = tidy(content.read().decode("utf-8-sig"))
        except UnicodeDecodeError:
            self._met.lose(where, "not UTF-8")
            return None
        if text is None or is_null(text):
            self._met.lose(where, "empty, or nan and the like")
            return None
        return text


def _doubtful(run: Sequence[_Sample]) -> set[str]:
    """Return names up to the last dot that occur several times in a run with different files."""
    files: dict[str, set[frozenset[str]]] = {}
    for sample in run:
        grouped: dict[str, set[str]] = {}
        for name in sample.names:
            grouped.setdefault(_without_suffix(name), set()).add(name)
        for stem, names in grouped.items():
            files.setdefault(stem, set()).add(frozenset(names))
    return {stem for stem, sets in files.items() if len(sets) > 1}


def _match(sample: _Sample) -> tuple[list[str | None], _Sample]:
    """Return the caption of each image of a sample, and the texts that belong to none."""
    by_stem: dict[str, list[str]] = {}
    for member, text in sample.texts:
        by_stem.setdefault(_without_suffix(member), []).append(text)
    own = [{member, _without_suffix(member)} & by_stem.keys() for _, member in sample.images]
    taken = set().union(*own)
    captions = [_joined([by_stem[stem] for stem in sorted(stems)]) for stems in own]
    left = _Sample(sample.name)
    rest = [(member, text) for member, text in sample.texts if _without_suffix(member) not in taken]
    # WebDataset's sample: `0001.txt` is of `0001.left.jpg` too, and `0001.caption.txt` of `0001.jpg`.
    name = sample.name.removeprefix("/")
    plain = [text for text in rest if _without_suffix(text[0]) == name]
    for place, (_, member) in enumerate(sample.images):
        found = plain or (rest if _without_suffix(member) == name else [])
        if captions[place] is None and found:
            captions[place] = _joined([[text] for _, text in found])
            left.by_first_dot += len(found)
            taken |= {_without_suffix(text[0]) for text in found}
    left.texts = [text for text in rest if _without_suffix(text[0]) not in taken]
    return captions, left


def _joined(texts: list[list[str]]) -> str | None:
    return "\n".join(dict.fromkeys(text for group in texts for text in group)) or None


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _without_suffix(member: str) -> str:
    """Return a member's name up to the last dot of its file name."""
    folder, slash, file = member.rpartition("/")
    return folder + slash + file.rpartition(".")[0]


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
