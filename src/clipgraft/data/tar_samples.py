"""Match the captions in a tar file with its images, in WebDataset's layout: `0001.jpg` beside `0001.txt`.

Which caption is whose is decided in `TarSamples`; what a text holds is decided by who reads it. Nothing here
opens a file: members and their content come from outside, so that local tar files and those at addresses are
matched alike.
"""

from __future__ import annotations

import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath

from clipgraft.data.image_files import Listing
from clipgraft.stored_images import TarMember

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_LIST = re.compile(r"\{([^{}]*,[^{}]*)\}")
_TWICE = "of a name that stands there twice, apart from its image"
_MOST_TEXT = 1 << 20  # bytes of a text; a longer member is none

Parse = Callable[[str], "list[str] | str"]
"""The captions in the text of a member, decoded; or why there are none, as in `3 not UTF-8`."""


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


@dataclass(frozen=True)
class TarImage:
    """An image of a tar file, with the captions found so far; in order, each once."""

    member: TarMember
    captions: tuple[str, ...] = ()


@dataclass
class _Sample:
    """Members of an archive with the same name up to the first dot of the file's name.

    Attributes:
        images: in order.
        texts: the captions of each text, with its member's name.
        by_first_dot: of what a match left: captions that went to images with another name behind that dot.
    """

    name: str
    names: set[str] = field(default_factory=set)
    images: list[TarMember] = field(default_factory=list)
    texts: list[tuple[str, list[str]]] = field(default_factory=list)
    by_first_dot: int = 0


@dataclass
class Met:
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


class TarSamples:
    """Matches captions to the images of one archive; a caption that may be another's is left out.

    WebDataset's rule is that a sample is what stands together under one name up to the first dot. Others name
    files `im.0.jpg`, `im.0.txt`, for whom the name goes up to the last dot: that match is taken first. Images
    are given out as they come. What has no partner beside it waits for the end of the archive, and a caption
    found there is given out with its image a second time.
    """

    def __init__(
        self,
        archive: str,
        read: Callable[[TarMember], bytes],
        parsers: Mapping[str, Parse],
        met: Met,
    ) -> None:
        """`read` gives the bytes of a member; `parsers` say which suffixes are texts, and what is in them."""
        self._archive, self._read, self._parsers, self._met = archive, read, parsers, met
        self._run: list[_Sample] = []  # several where names repeat
        self._seen: Counter[str] = Counter()
        self._waiting: dict[str, _Sample] = {}

    def of(self, members: Iterator[TarMember | tarfile.TarInfo]) -> Iterator[TarImage]:
        """Yield all images of an archive; of a damaged one, those before the damage, and then its error."""
        try:
            for member in members:
                yield from self._take(member)
        except (tarfile.TarError, EOFError, OSError):
            yield from self._finish()
            raise
        yield from self._finish()

    def _take(self, member: TarMember | tarfile.TarInfo) -> Iterator[TarImage]:
        """Take in the next member; yields the images of the sample before it, if that has ended."""
        if not isinstance(member, TarMember):
            self._met.listing.other["links"] += member.islnk() or member.issym()
            return
        folder, _, file = member.name.rpartition("/")
        is_image = self._met.listing.add(file)
        is_text = not is_image and not file.startswith(".") and _suffix(file) in self._parsers
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
            self._run[-1].images.append(member)
        elif (captions := self._captions(member)) is not None:
            self._run[-1].texts.append((member.name, captions))

    def _finish(self) -> Iterator[TarImage]:
        """Yield the last sample, and captions for images that do not stand beside them."""
        yield from self._end_run()
        for sample in self._waiting.values():
            if any(self._seen[name] > 1 for name in sample.names):
                self._lose(sample, _TWICE)
                continue
            captions, left = _match(sample)
            self._met.apart += len(sample.texts) - len(left.texts)
            self._met.by_first_dot += left.by_first_dot
            for member, found in zip(sample.images, captions, strict=True):
                if found:
                    yield TarImage(member, found)
            self._lose(left, "without an image")
        self._waiting = {}

    def _end_run(self) -> Iterator[TarImage]:
        run, self._run = self._run, []
        doubtful = _doubtful(run) if len(run) > 1 else set()
        for sample in run:
            unsure = [text for text in sample.texts if _without_suffix(text[0]) in doubtful]
            self._lose(replace(sample, texts=unsure), _TWICE)
            sample.texts = [text for text in sample.texts if text not in unsure]
            captions, left = _match(sample)
            for member, found in zip(sample.images, captions, strict=True):
                if member.turn > 1:
                    self._met.repeated.append(f"{self._archive}::{member.name}::{member.turn}")
                yield TarImage(member, found)
                if not found:
                    self._wait(sample.name, member.name).images.append(member)
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

    def _captions(self, member: TarMember) -> list[str] | None:
        """Return the captions of a text, or None where it has none, which is counted."""
        where = f"{self._archive}::{member.name}"
        if member.size > _MOST_TEXT:
            self._met.lose(where, f"longer than {_MOST_TEXT >> 20} MiB")
            return None
        try:
            found = self._parsers[_suffix(member.name)](self._read(member).decode("utf-8-sig"))
        except UnicodeDecodeError:
            found = "not UTF-8"
        if isinstance(found, str):
            if found:
                self._met.lose(where, found)
            return None
        return found


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


def _match(sample: _Sample) -> tuple[list[tuple[str, ...]], _Sample]:
    """Return the captions of each image of a sample, and the texts that belong to none."""
    by_stem: dict[str, list[str]] = {}
    for member, texts in sample.texts:
        by_stem.setdefault(_without_suffix(member), []).extend(texts)
    own = [{m.name, _without_suffix(m.name)} & by_stem.keys() for m in sample.images]
    taken = set().union(*own)
    captions = [_distinct([by_stem[stem] for stem in sorted(stems)]) for stems in own]
    left = _Sample(sample.name)
    rest = [text for text in sample.texts if _without_suffix(text[0]) not in taken]
    # WebDataset's sample: `0001.txt` is of `0001.left.jpg` too, and `0001.caption.txt` of `0001.jpg`.
    name = sample.name.removeprefix("/")
    plain = [text for text in rest if _without_suffix(text[0]) == name]
    for place, image in enumerate(sample.images):
        found = plain or (rest if _without_suffix(image.name) == name else [])
        if not captions[place] and found:
            captions[place] = _distinct([texts for _, texts in found])
            left.by_first_dot += len(found)
            taken |= {_without_suffix(text[0]) for text in found}
    left.texts = [text for text in rest if _without_suffix(text[0]) not in taken]
    return captions, left


def _distinct(texts: list[list[str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text for group in texts for text in group))


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _without_suffix(member: str) -> str:
    """Return a member's name up to the last dot of its file name."""
    folder, slash, file = member.rpartition("/")
    return folder + slash + file.rpartition(".")[0]
