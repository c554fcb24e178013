"""Images with their captions, read from a table and checked before anything is trained on them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, overload

from clipgraft.data.listing import Listing, list_images
from clipgraft.data.paths import ImageFinder
from clipgraft.data.rows import BadRow, Row, Table
from clipgraft.data.summary import MAX_BAD_ROWS, BadRows, DataReport, Remarks
from clipgraft.data.table_options import TableOptions
from clipgraft.data.tables import open_table
from clipgraft.errors import DataError
from clipgraft.pictures import ImageError, check_images
from clipgraft.progress import Progress, Told, showing

DECODE_UP_TO = 50_000
"""Up to this many images verify="auto" decodes each (0.4 ms a small photo); beyond, it reads headers."""


@dataclass(frozen=True)
class Pairs:
    """Images and their captions in order: `captions[i]` belongs to `images[i]` and is never empty."""

    images: tuple[Path, ...]
    captions: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.images)

    @overload
    def __getitem__(self, chosen: int) -> tuple[Path, tuple[str, ...]]: ...

    @overload
    def __getitem__(self, chosen: slice) -> Pairs: ...

    def __getitem__(self, chosen: int | slice) -> Pairs | tuple[Path, tuple[str, ...]]:
        """`pairs[5]` is an image with its captions, `pairs[:100]` are pairs."""
        if isinstance(chosen, slice):
            return Pairs(self.images[chosen], self.captions[chosen])
        return self.images[chosen], self.captions[chosen]

    def __iter__(self) -> Iterator[tuple[Path, tuple[str, ...]]]:
        return iter(zip(self.images, self.captions, strict=True))

    def __repr__(self) -> str:
        captions = sum(map(len, self.captions))
        return f"Pairs({len(self):,} images, {captions:,} captions)"

    def to_dict(self) -> dict[str, list[Any]]:
        """Columns with a row for every caption, as for a DataFrame."""
        rows = self.rows()
        return {
            "filepath": [str(self.images[image]) for image, _ in rows],
            "title": [caption for _, caption in rows],
        }

    def rows(self) -> list[tuple[int, str]]:
        """(image index, caption) for every caption, in order: what one epoch goes over, as in open_clip."""
        return [(image, caption) for image, texts in enumerate(self.captions) for caption in texts]


@dataclass
class _Gathered:
    """What has been read so far. `images`: file -> its captions (a dict as an ordered set) and its rows."""

    images: dict[Path, tuple[dict[str, None], list[Row]]] = field(default_factory=dict)
    missing: set[str] = field(default_factory=set)
    unreadable: set[Path] = field(default_factory=set)
    rows: int = 0
    empty_captions: int = 0
    null_captions: int = 0
    repeated_captions: int = 0


def read_pairs(
    source: str | Path,
    *,
    dataset_type: str = "auto",
    image_key: str | None = None,
    caption_key: str | None = None,
    separator: str | None = None,
    encoding: str | None = None,
    quoting: str = "auto",
    image_root: str | Path | None = None,
    keep_nulls: bool = False,
    strict: bool = False,
    max_bad_rows: int | None = MAX_BAD_ROWS,
    verify: Literal["auto", "decode", "header"] = "auto",
    workers: int | None = None,
    progress: Progress = None,
) -> tuple[Pairs, DataReport]:
    """Read a CSV, TSV, JSON Lines or Parquet file, or a folder, and check every image.

    Rows that name the same image are one image with many captions, in the order of first appearance. Relative
    paths are relative to the file's folder. A row is bad, and is skipped, when it cannot be parsed, its image
    is missing or unreadable, or it has no caption.

    `image_key` to `keep_nulls` are told in `TableOptions`: names of columns (several captions by commas), and
    how the file is written.

    `max_bad_rows` is how many are skipped before reading stops (None: any number); `strict` stops at the
    first. `verify="decode"` decodes each image, the only way to see that one is cut short; "header" is quick.
    `workers` is the number of threads for it, and `progress` None shows a bar in
    terminals and notebooks, True always, False never; or it is a function of (done, of how many).

    Raises DataError when the table cannot be read, has too many bad rows, or leaves nothing to train on.
    """
    root = None if image_root is None else Path(image_root)
    options = TableOptions(
        dataset_type, image_key, caption_key, separator, encoding, quoting, root, keep_nulls
    )
    table = open_table(Path(source), options)
    bad = BadRows(table.source, table.unit, strict=strict, limit=max_bad_rows)
    finder = ImageFinder(table.folder)
    remarks = Remarks(table.unit)
    gathered = _gather(table, finder, bad, remarks)
    decode = verify == "decode" or (verify == "auto" and len(gathered.images) <= DECODE_UP_TO)
    with showing(progress, "checking images") as told:
        _drop_unreadable(gathered, bad, decode, workers, told)
    if not gathered.images:
        raise DataError(_nothing_left(table, gathered, bad))
    pairs = Pairs(tuple(gathered.images), tuple(tuple(texts) for texts, _ in gathered.images.values()))
    found = (*table.notes, *finder.notes(), *remarks.notes())
    notes = (*found, *_checked(decode, verify), *_left_over(Path(source), table, gathered))
    return pairs, _report(table, pairs, gathered, bad, notes)


def find_duplicates(paths: tuple[Path, ...]) -> tuple[tuple[Path, ...], ...]:
    """Groups of two or more files with the same bytes. Only files of equal size are read."""
    return tuple(
        group for same in _groups(paths, lambda path: path.stat().st_size) for group in _groups(same, _digest)
    )


def _gather(table: Table, finder: ImageFinder, bad: BadRows, remarks: Remarks) -> _Gathered:
    gathered = _Gathered()
    with closing(table.rows()) as rows:
        for row in rows:
            gathered.rows += 1
            if isinstance(row, BadRow):
                bad.add(row)
                continue
            remarks.add(row)
            _add(gathered, row, finder.find(row.image), bad)
    if gathered.rows == 0:
        raise DataError(f"{table.source}: has no rows, only a header; add at least one image with a caption")
    return gathered


def _add(gathered: _Gathered, row: Row, found: Path | str, bad: BadRows) -> None:
    texts = [caption for caption in row.captions if caption]
    gathered.null_captions += row.nulls
    gathered.empty_captions += max(len(row.captions), 1) - len(texts) - row.nulls
    if isinstance(found, str):
        gathered.missing.add(row.image)
        bad.add(BadRow(row.number, row.image, found, "image not found"))
    elif not texts:
        why = "caption is nan or the like" if row.nulls else "empty caption"
        bad.add(BadRow(row.number, row.image, why))
    else:
        captions, rows = gathered.images.setdefault(found, ({}, []))
        before = len(captions)
        captions.update(dict.fromkeys(texts))
        gathered.repeated_captions += len(texts) - (len(captions) - before)
        rows.append(row)


def _drop_unreadable(
    gathered: _Gathered, bad: BadRows, decode: bool, workers: int | None, progress: Told | None
) -> None:
    paths = list(gathered.images)
    with closing(check_images(paths, decode=decode, workers=workers, progress=progress)) as checks:
        for path, reason in checks:
            if reason is not None:
                gathered.unreadable.add(path)
                _, rows = gathered.images.pop(path)
                for row in rows:
                    bad.add(BadRow(row.number, row.image, reason))


def _nothing_left(table: Table, gathered: _Gathered, bad: BadRows) -> str:
    return f"{table.source}: none of its {gathered.rows:,} rows can be used ({bad.examples()}); correct them"


def _checked(decode: bool, verify: str) -> tuple[str, ...]:
    if decode:
        return ()
    why = f" (more than {DECODE_UP_TO:,} images)" if verify == "auto" else ""
    return (
        f"only the headers of the images were checked{why}; an image that is cut short stops the run later",
    )


def _left_over(source: Path, table: Table, gathered: _Gathered) -> tuple[str, ...]:
    """For a folder with a captions file: how many of its images no row names."""
    if table.source == source:
        return ()
    named = gathered.images.keys() | gathered.unreadable
    listing = Listing()
    unnamed = sum(Path(os.path.normpath(path)) not in named for path in list_images(source, listing))
    left = (f"{unnamed:,} images in the folder have no caption: left out",) if unnamed > 0 else ()
    return (*listing.notes(), *left)


def _report(
    table: Table, pairs: Pairs, gathered: _Gathered, bad: BadRows, notes: tuple[str, ...]
) -> DataReport:
    counts = [len(texts) for texts in pairs.captions]
    return DataReport(
        source=table.source,
        kind=table.kind,
        unit=table.unit,
        rows=gathered.rows,
        bad_rows=bad.count,
        images=len(pairs),
        captions=sum(counts),
        fewest_captions=min(counts),
        most_captions=max(counts),
        empty_captions=gathered.empty_captions,
        null_captions=gathered.null_captions,
        reasons=tuple(bad.reasons.most_common()),
        repeated_captions=gathered.repeated_captions,
        missing_images=len(gathered.missing),
        unreadable_images=len(gathered.unreadable),
        duplicates=find_duplicates(pairs.images),
        first_bad=tuple(sorted(bad.first, key=lambda row: row.number)),
        notes=notes,
    )


def _groups(paths: tuple[Path, ...], key: Callable[[Path], int | bytes]) -> Iterator[tuple[Path, ...]]:
    groups: dict[int | bytes, list[Path]] = {}
    for path in paths:
        groups.setdefault(key(path), []).append(path)
    return (tuple(group) for group in groups.values() if len(group) > 1)


def _digest(path: Path) -> bytes:
    digest = hashlib.blake2b()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise ImageError(str(path), f"cannot be read: {error.strerror}") from error
    return digest.digest()
