"""Read images with captions or classes from any kind of source, and check every image."""

from __future__ import annotations

import hashlib
import logging
import os
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from clipgraft.data.args import LabelArgs, TableArgs
from clipgraft.data.datasets import Labelled, Pairs
from clipgraft.data.delimited import is_token_file
from clipgraft.data.doors import open_table
from clipgraft.data.image_files import ImageFinder, Listing, list_images
from clipgraft.data.summary import BadRows, LabelReport, PairReport, Remarks
from clipgraft.data.table import LABEL, LABELS, PAIRS, TEXTS, BadRow, Row, Table, Wanted
from clipgraft.data.text_files import text_lines
from clipgraft.errors import DataError
from clipgraft.pictures import ImageError, check_images
from clipgraft.progress import Progress, showing
from clipgraft.stored_images import image_bytes, open_bytes

log = logging.getLogger("clipgraft")

DECODE_UP_TO = 50_000
"""Up to this many images verify="auto" decodes each (0.4 ms a small photo); beyond, it reads headers."""

Verify = Literal["auto", "decode", "header"]


def read_pairs(
    source: str | Path,
    args: TableArgs | None = None,
    *,
    verify: Verify = "auto",
    workers: int | None = None,
    progress: Progress = None,
    **options: Any,
) -> Pairs:
    """Read a table, a folder, tar files or a data set, and check every image.

    Tables are CSV, TSV, JSON, Parquet, spreadsheets, and SQLite or DuckDB files with a `query`; a path may be
    a pattern of tar files (`shards/{00..99}.tar`) or an address (`hf://datasets/OWNER/NAME`). An image inside
    a tar or Parquet file has a path below that file, which `clipgraft.pictures.open_image` opens.

    Rows that name the same image are one image with many captions, in the order of first appearance. Relative
    paths are relative to the file's folder. A row is bad, and is skipped, when it cannot be parsed, its image
    is missing or unreadable, or it has no caption. `pairs.report` tells what was read and what was skipped.

    Args:
        source: the file or folder.
        args: which columns are read, how the file is written, and how many bad rows are skipped.
        verify: "decode" opens each image whole, the only way to see that one is cut short; "header" is quick;
            "auto" decodes up to `DECODE_UP_TO` images.
        workers: threads that check images.
        progress: None shows a bar in terminals and notebooks, True always, False never; or a function of
            (done, of how many).
        **options: single fields of `TableArgs`, such as `csv_img_key="photo"`, in place of those of `args`.

    Raises:
        DataError: the source cannot be read, has too many bad rows, or leaves nothing to train on.
        ConfigError: an option is wrong.
    """
    args = (args or TableArgs()).replace(**options)
    table = open_table(Path(source), args, PAIRS)
    gathered = _Gathered(table, PAIRS, args)
    gathered.read()
    gathered.check(verify, workers, progress)
    captions = tuple(tuple(texts) for texts, _ in gathered.images.values())
    counts = [len(texts) for texts in captions]
    report = PairReport(
        captions=sum(counts),
        fewest_captions=min(counts),
        most_captions=max(counts),
        empty_captions=gathered.empty,
        null_captions=gathered.nulls,
        repeated_captions=gathered.repeated,
        **gathered.facts(_left_over(Path(source), table, gathered)),
    )
    return Pairs(tuple(gathered.images), captions, report)


def read_labelled(
    source: str | Path,
    args: LabelArgs | None = None,
    *,
    verify: Verify = "auto",
    workers: int | None = None,
    progress: Progress = None,
    **options: Any,
) -> Labelled:
    """Read a folder of class folders, a table with a label column, tar files or a data set with classes.

    In a folder, the class of an image is the name of the folder right below `source` that holds it, at any
    depth; hidden files and folders are left out. In a table, a label is text or a number. A row without a
    label is bad. A class without a usable image is left out and reported.

    Args:
        source: the folder or file.
        args: which columns are read, how the file is written, and how many bad rows are skipped.
        verify, workers, progress: as in `read_pairs`.
        **options: single fields of `LabelArgs`, such as `csv_label_key="breed"`, in place of those of `args`.

    Raises:
        DataError: no class folders or label column, too many bad rows, an image with two different labels,
            or fewer than two classes with usable images.
        ConfigError: an option is wrong.
    """
    args = (args or LabelArgs()).replace(**options)
    table = open_table(Path(source), args, LABELS)
    gathered = _Gathered(table, LABELS, args)
    gathered.read()
    gathered.check(verify, workers, progress)
    labels = [min(texts) for texts, _ in gathered.images.values()]
    classes = tuple(sorted(set(labels)))
    if len(classes) < 2:
        skipped = f" ({gathered.bad.count:,} rows were skipped: {gathered.bad.examples()})"
        raise DataError(
            f'{table.source}: one class only, "{classes[0]}"{skipped if gathered.bad.count else ""}; '
            "a classifier needs two or more"
        )
    index = {name: label for label, name in enumerate(classes)}
    data = Labelled(tuple(gathered.images), tuple(index[label] for label in labels), classes)
    facts = gathered.facts()
    label_of = dict(zip(data.images, labels, strict=True))
    mixed = tuple(group for group in facts["duplicates"] if len({label_of[path] for path in group}) > 1)
    empty = tuple(sorted({*table.labels, *gathered.seen} - {*classes}))
    report = LabelReport(
        classes=classes, counts=data.counts(), empty_classes=empty, mixed_duplicates=mixed, **facts
    )
    return Labelled(data.images, data.labels, classes, report)


def read_texts(source: str | Path, args: TableArgs | None = None, **options: Any) -> tuple[str, ...]:
    """Read the distinct texts of a source, in order; images are not opened.

    A `.txt` is one text a line, unless it is written like Flickr's captions or one of the options says that
    it is a table; all else is read as tables of pairs are. Rows without a text are skipped, and counted in
    one log line.

    Args:
        source: the file or folder.
        args: which column is read, and how the file is written.
        **options: single fields of `TableArgs` in place of those of `args`.

    Raises:
        DataError: the source cannot be read, or holds no text.
        ConfigError: an option is wrong.
    """
    source, args = Path(source), (args or TableArgs()).replace(**options)
    if _is_lines(source, args):
        with closing(text_lines(source, args.csv_encoding)) as lines:
            texts = dict.fromkeys(stripped for line in lines if (stripped := line.strip()))
    else:
        texts = _texts_of(open_table(source, args, TEXTS))
    if not texts:
        raise DataError(f"{source}: holds no text; give captions, or a .txt with one text a line")
    return tuple(texts)


def names_images(source: str | Path, args: TableArgs | None = None) -> bool:
    """Whether what `read_texts` reads names images beside its texts; they are not looked for.

    Raises:
        DataError: the source cannot be read, or has no column of texts.
    """
    source, args = Path(source), args or TableArgs()
    return not _is_lines(source, args) and open_table(source, args, TEXTS).has_images


def _is_lines(source: Path, args: TableArgs) -> bool:
    """Whether a file is one text a line, rather than a table."""
    named = (args.csv_img_key, args.csv_caption_key, args.csv_separator) != (None, None, None)
    if named or source.suffix.lower() != ".txt" or args.dataset_type != "auto" or not source.is_file():
        return False
    with closing(text_lines(source, args.csv_encoding)) as lines:
        is_empty = not any(line.strip() for line in lines)
    return is_empty or not is_token_file(source, args.csv_encoding)


def _texts_of(table: Table) -> dict[str, None]:
    texts: dict[str, None] = {}
    skipped = 0
    with closing(table.rows()) as rows:
        for row in rows:
            found = [] if isinstance(row, BadRow) else [text for text in row.texts if text]
            skipped += not found
            texts.update(dict.fromkeys(found))
    if skipped:
        log.info("%s: %d %ss without a text were skipped", table.source, skipped, table.unit)
    return texts


@dataclass
class _Gathered:
    """What has been read of a table so far.

    Attributes:
        images: file -> its captions or its label (a dict as an ordered set), and the rows that name it.
        seen: labels that some row has, whether or not its image can be used.
        missing: names of images that are not there.
        unreadable: files that are no whole images.
        rows: all of them.
        empty, nulls, repeated: captions that were left out.
    """

    table: Table
    wanted: Wanted
    args: TableArgs
    images: dict[Path, tuple[dict[str, None], list[Row]]] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    missing: set[str] = field(default_factory=set)
    unreadable: set[Path] = field(default_factory=set)
    rows: int = 0
    empty: int = 0
    nulls: int = 0
    repeated: int = 0
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        table = self.table
        strict, limit = self.args.strict, self.args.max_bad_rows
        self.bad = BadRows(table.source, table.unit, strict=strict, limit=limit)
        self.is_labels = self.wanted.text is LABEL

    def read(self) -> None:
        """Go over all rows, and find their images."""
        table, finder, remarks = self.table, ImageFinder(self.table.folder), Remarks(self.table.unit)
        with closing(table.rows()) as rows:
            for row in rows:
                self.rows += 1
                if isinstance(row, BadRow):
                    self.bad.add(row)
                    continue
                if row.remark:
                    remarks.add(row)
                self._add(row, finder.find(row.image))
        if self.rows == 0:
            what = "images with labels" if self.is_labels else "at least one image with a caption"
            raise DataError(f"{table.source}: has no rows, only a header; add {what}")
        self.notes = (*table.notes, *table.met(), *finder.notes(), *remarks.notes())

    def _add(self, row: Row, found: Path | str) -> None:
        texts = [text for text in row.texts if text]
        if len(texts) != len(row.texts) or not texts:
            self.nulls += row.nulls
            self.empty += max(len(row.texts), 1) - len(texts) - row.nulls
        if self.is_labels:
            texts = [unicodedata.normalize("NFC", text) for text in texts]
            self.seen.update(texts)
        if isinstance(found, str):
            self.missing.add(row.image)
            self.bad.add(BadRow(row.number, row.image, found, "image not found"))
        elif not texts:
            why = (
                "no label"
                if self.is_labels
                else "caption is nan or the like"
                if row.nulls
                else "empty caption"
            )
            self.bad.add(BadRow(row.number, row.image, why))
        else:
            entry = self.images.get(found)
            if entry is None:
                entry = self.images[found] = ({}, [])
            known, rows = entry
            before = len(known)
            for text in texts:
                known[text] = None
            self.repeated += len(texts) - (len(known) - before)
            rows.append(row)
            if self.is_labels and len(known) > 1:
                self._refuse_second_label(row, list(known), rows[0])

    def _refuse_second_label(self, row: Row, labels: list[str], first: Row) -> None:
        unit = self.table.unit
        raise DataError(
            f'{self.table.source}: {row.image} is labelled "{labels[0]}" ({unit} {first.number}) and '
            f'"{labels[1]}" ({unit} {row.number}); an image has one class, so correct one of them'
        )

    def check(self, verify: Verify, workers: int | None, progress: Progress) -> None:
        """Open every image, and drop those that cannot be used. Raises DataError where none is left."""
        decode = verify == "decode" or (verify == "auto" and len(self.images) <= DECODE_UP_TO)
        paths = list(self.images)
        with (
            showing(progress, "checking images") as told,
            closing(check_images(paths, decode=decode, workers=workers, progress=told)) as checks,
        ):
            for path, reason in checks:
                if reason is not None:
                    self.unreadable.add(path)
                    _, rows = self.images.pop(path)
                    for row in rows:
                        self.bad.add(BadRow(row.number, row.image, reason))
        if not self.images:
            why = f"none of its {self.rows:,} rows can be used ({self.bad.examples()})"
            raise DataError(f"{self.table.source}: {why}; correct them")
        if not decode:
            why = f" (more than {DECODE_UP_TO:,} images)" if verify == "auto" else ""
            only = f"only the headers of the images were checked{why}"
            self.notes = (*self.notes, f"{only}; an image that is cut short stops the run later")

    def facts(self, notes: tuple[str, ...] = ()) -> dict[str, Any]:
        """Return what every report has."""
        return {
            "source": self.table.source,
            "kind": self.table.kind,
            "unit": self.table.unit,
            "rows": self.rows,
            "bad_rows": self.bad.count,
            "images": len(self.images),
            "missing_images": len(self.missing),
            "unreadable_images": len(self.unreadable),
            "duplicates": find_duplicates(tuple(self.images)),
            "reasons": tuple(self.bad.reasons.most_common()),
            "first_bad": tuple(sorted(self.bad.first, key=lambda row: row.number)),
            "notes": (*self.notes, *notes),
        }


def _left_over(source: Path, table: Table, gathered: _Gathered) -> tuple[str, ...]:
    """Count the images that no row names, for a folder with a captions file."""
    if table.source == source:
        return ()
    named = gathered.images.keys() | gathered.unreadable
    listing = Listing()
    unnamed = sum(Path(os.path.normpath(path)) not in named for path in list_images(source, listing))
    left = (f"{unnamed:,} images in the folder have no caption: left out",) if unnamed > 0 else ()
    return (*listing.notes(), *left)


def find_duplicates(paths: tuple[Path, ...]) -> tuple[tuple[Path, ...], ...]:
    """Group files with the same bytes, two or more a group. Only files of equal size are read."""
    return tuple(group for same in _groups(paths, image_bytes) for group in _groups(same, _digest))


def _groups(paths: tuple[Path, ...], key: Callable[[Path], int | bytes]) -> Iterator[tuple[Path, ...]]:
    groups: dict[int | bytes, list[Path]] = {}
    for path in paths:
        groups.setdefault(key(path), []).append(path)
    return (tuple(group) for group in groups.values() if len(group) > 1)


def _digest(path: Path) -> bytes:
    digest = hashlib.blake2b()
    try:
        with open_bytes(path) as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise ImageError(str(path), f"cannot be read: {error.strerror}") from error
    return digest.digest()
