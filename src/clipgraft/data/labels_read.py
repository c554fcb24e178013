"""Read images with one class each, and check every image before anything is trained on them."""

from __future__ import annotations

import unicodedata
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from clipgraft.data.labels import Labelled
from clipgraft.data.labels_report import LabelReport
from clipgraft.data.labels_table import LabelTable, open_labels
from clipgraft.data.pairs import DECODE_UP_TO, find_duplicates
from clipgraft.data.paths import ImageFinder
from clipgraft.data.rows import BadRow, Row, Table
from clipgraft.data.summary import MAX_BAD_ROWS, BadRows, Remarks
from clipgraft.data.table_options import TableOptions
from clipgraft.errors import DataError
from clipgraft.pictures import check_images
from clipgraft.progress import Progress, Told, showing


@dataclass
class _Gathered:
    """What has been read so far. `images`: file -> its label and the rows that name it."""

    images: dict[Path, tuple[str, list[Row]]] = field(default_factory=dict)
    classes: set[str] = field(default_factory=set)
    missing: set[str] = field(default_factory=set)
    unreadable: int = 0
    rows: int = 0


def read_labelled(
    source: str | Path,
    *,
    image_key: str | None = None,
    label_key: str | None = None,
    separator: str | None = None,
    encoding: str | None = None,
    quoting: str = "auto",
    image_root: str | Path | None = None,
    strict: bool = False,
    max_bad_rows: int | None = MAX_BAD_ROWS,
    workers: int | None = None,
    progress: Progress = None,
) -> tuple[Labelled, LabelReport]:
    """Read a folder of class folders, or a CSV, TSV, JSON Lines or Parquet file with a label column.

    In a folder, the class of an image is the name of the folder right below `source` that holds it, at any
    depth; hidden files and folders are left out. In a table, relative paths are relative to its folder, and a
    label is text or a number. A row is bad, and is skipped, when it cannot be parsed, its image is missing or
    unreadable, or it has no label. A class that is left without an image is left out and reported.

    Args:
        source: the folder or file.
        image_key, label_key: names of the columns; where None, usual names are tried.
        separator: of a CSV; where None, the usual ones are tried.
        encoding, quoting, image_root: see `TableOptions`.
        strict: stop at the first bad row.
        max_bad_rows: how many are skipped before reading stops; None for any number.
        workers: threads that check images. More than `pairs.DECODE_UP_TO` have only
            their headers read.
        progress: None shows a bar in terminals and notebooks, True always, False never; or a function of
            (done, of how many).

    Raises:
        DataError: no class folders or label column, too many bad rows, an image with two different labels,
            or fewer than two classes with usable images.
    """
    root = None if image_root is None else Path(image_root)
    options = TableOptions("auto", image_key, label_key, separator, encoding, quoting, root, numbers=True)
    opened = open_labels(Path(source), options)
    table = opened.table
    bad = BadRows(table.source, table.unit, strict=strict, limit=max_bad_rows)
    finder = ImageFinder(table.folder)
    remarks = Remarks(table.unit)
    gathered = _gather(table, finder, bad, remarks)
    decode = len(gathered.images) <= DECODE_UP_TO
    with showing(progress, "checking images") as told:
        _drop_unreadable(gathered, bad, decode, workers, told)
    data = _labelled(table, gathered, bad)
    return data, _report(opened, data, gathered, bad, decode, (*finder.notes(), *remarks.notes()))


def _gather(table: Table, finder: ImageFinder, bad: BadRows, remarks: Remarks) -> _Gathered:
    gathered = _Gathered()
    with closing(table.rows()) as rows:
        for row in rows:
            gathered.rows += 1
            if isinstance(row, BadRow):
                bad.add(row)
                continue
            remarks.add(row)
            _add(table, gathered, row, finder.find(row.image), bad)
    if gathered.rows == 0:
        raise DataError(f"{table.source}: has no rows, only a header; add images with labels")
    return gathered


def _add(table: Table, gathered: _Gathered, row: Row, found: Path | str, bad: BadRows) -> None:
    labels = {unicodedata.normalize("NFC", text) for text in row.captions if text}
    gathered.classes |= labels
    if isinstance(found, str):
        gathered.missing.add(row.image)
        bad.add(BadRow(row.number, row.image, found, "image not found"))
    elif not labels:
        bad.add(BadRow(row.number, row.image, "no label"))
    else:
        first = min(labels)
        known, rows = gathered.images.setdefault(found, (first, []))
        others = labels - {known}
        if others:
            where = f"{table.unit} {rows[0].number if rows else row.number}"
            raise DataError(
                f'{table.source}: {row.image} is labelled "{known}" ({where}) and "{min(others)}" '
                f"({table.unit} {row.number}); an image has one class, so correct one of them"
            )
        rows.append(row)


def _drop_unreadable(
    gathered: _Gathered, bad: BadRows, decode: bool, workers: int | None, progress: Told | None
) -> None:
    paths = list(gathered.images)
    with closing(check_images(paths, decode=decode, workers=workers, progress=progress)) as checks:
        for path, reason in checks:
            if reason is not None:
                gathered.unreadable += 1
                _, rows = gathered.images.pop(path)
                for row in rows:
                    bad.add(BadRow(row.number, row.image, reason))


def _labelled(table: Table, gathered: _Gathered, bad: BadRows) -> Labelled:
    if not gathered.images:
        raise DataError(
            f"{table.source}: none of its {gathered.rows:,} rows can be used ({bad.examples()}); correct them"
        )
    classes = tuple(sorted({label for label, _ in gathered.images.values()}))
    if len(classes) < 2:
        skipped = f" ({bad.count:,} rows were skipped: {bad.examples()})" if bad.count else ""
        raise DataError(
            f'{table.source}: one class only, "{classes[0]}"{skipped}; a classifier needs two or more'
        )
    index = {name: label for label, name in enumerate(classes)}
    labels = tuple(index[label] for label, _ in gathered.images.values())
    return Labelled(tuple(gathered.images), labels, classes)


def _report(
    opened: LabelTable,
    data: Labelled,
    gathered: _Gathered,
    bad: BadRows,
    decode: bool,
    found: tuple[str, ...],
) -> LabelReport:
    table = opened.table
    duplicates = find_duplicates(data.images)
    label = dict(zip(data.images, data.labels, strict=True))
    headers = (
        f"only the headers of more than {DECODE_UP_TO:,} images were checked; one cut short stops the run"
    )
    return LabelReport(
        source=table.source,
        kind=table.kind,
        unit=table.unit,
        rows=gathered.rows,
        bad_rows=bad.count,
        classes=data.classes,
        counts=data.counts(),
        empty_classes=tuple(sorted({*opened.empty_classes, *gathered.classes} - {*data.classes})),
        missing_images=len(gathered.missing),
        unreadable_images=gathered.unreadable,
        duplicates=duplicates,
        mixed_duplicates=tuple(group for group in duplicates if len({label[path] for path in group}) > 1),
        reasons=tuple(bad.reasons.most_common()),
        first_bad=tuple(sorted(bad.first, key=lambda row: row.number)),
        notes=(*table.notes, *found) if decode else (*table.notes, *found, headers),
    )
