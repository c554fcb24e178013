"""The summary of images with classes that a person reads before training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clipgraft.data.rows import BadRow
from clipgraft.data.summary import describe_row, fact_lines
from clipgraft.results import Result

_LISTED = 40  # classes that are listed one by one; beyond, only the largest and smallest are


@dataclass(frozen=True, repr=False)
class LabelReport(Result):
    """Counts of one data set with labels.

    Attributes:
        source, kind, unit: what was read, how, and what a row number counts.
        rows: rows of the table, or images in the class folders.
        bad_rows: of those, how many were skipped.
        classes, counts: names and numbers of usable images.
        empty_classes: classes that are left out because no image of theirs can be used.
        missing_images: files that are not there.
        unreadable_images: files that are no whole images.
        duplicates: groups of files with the same bytes.
        mixed_duplicates: those of them whose files have different labels.
        reasons: why rows were skipped, each with how many, most first.
        first_bad: a few skipped rows.
        notes: choices made for the user.
    """

    _shows = ("source", "kind", "rows", "bad_rows", "images", "classes", "missing_images", "notes")

    source: Path
    kind: str
    unit: str
    rows: int
    bad_rows: int
    classes: tuple[str, ...]
    counts: tuple[int, ...]
    empty_classes: tuple[str, ...] = ()
    missing_images: int = 0
    unreadable_images: int = 0
    duplicates: tuple[tuple[Path, ...], ...] = ()
    mixed_duplicates: tuple[tuple[Path, ...], ...] = ()
    reasons: tuple[tuple[str, int], ...] = ()
    first_bad: tuple[BadRow, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def images(self) -> int:
        return sum(self.counts)

    @property
    def imbalance(self) -> float:
        """How many times as many images the largest class has as the smallest."""
        return max(self.counts) / min(self.counts)

    @property
    def duplicate_images(self) -> int:
        """Images whose bytes are also those of another image that comes before them."""
        return sum(len(group) - 1 for group in self.duplicates)


def format_label_report(report: LabelReport) -> str:
    """The report as aligned text, one line a fact; a line that tells of a problem says what to do."""
    lines = [f"{report.source} ({report.kind})", *(f"  note: {note}" for note in report.notes)]
    lines += fact_lines([*_facts(report), *_problems(report)])
    lines += ["  images of each class:", *(f"  {line}" for line in _class_lines(report))]
    if report.reasons:
        lines.append(f"  why {report.unit}s were skipped:")
        lines += [f"  {line}" for line in fact_lines([(why, count, "") for why, count in report.reasons])]
    if report.first_bad:
        first = "first " if report.bad_rows > len(report.first_bad) else ""
        lines.append(f"  {first}skipped {report.unit}s:")
        lines += [f"    {describe_row(row, report.unit)}" for row in report.first_bad]
    return "\n".join(lines)


def _facts(report: LabelReport) -> list[tuple[str, int, str]]:
    ordered = _by_size(report)
    (largest, most), (smallest, fewest) = ordered[0], ordered[-1]
    ratio = f"{report.imbalance:.1f} times the smallest" if most > fewest else "all classes are the same size"
    advice = "; class weights can balance this" if report.imbalance >= 3 else ""
    return [
        ("rows", report.rows, ""),
        ("images", report.images, ""),
        ("classes", len(report.classes), f"{report.images / len(report.classes):.1f} images on average"),
        ("largest class", most, f"{largest}, {ratio}{advice}"),
        ("smallest class", fewest, smallest),
    ]


def _problems(report: LabelReport) -> list[tuple[str, int, str]]:
    problems = [
        ("skipped rows", report.bad_rows, "listed below; --strict stops at the first"),
        ("missing images", report.missing_images, "skipped: correct the paths, or add the files"),
        ("unreadable images", report.unreadable_images, "skipped: replace the files listed below"),
        ("empty classes", len(report.empty_classes), f"left out: {_some(report.empty_classes)}"),
        ("duplicate images", report.duplicate_images, f"same file twice ({_pair(report.duplicates)})"),
        (
            "of these in two classes",
            sum(len(group) for group in report.mixed_duplicates),
            f"{_pair(report.mixed_duplicates)}: one file cannot show both, remove one",
        ),
    ]
    shown = problems if report.mixed_duplicates else problems[:-1]
    return [(name, count, advice if count else "") for name, count, advice in shown]


def _class_lines(report: LabelReport) -> list[str]:
    ordered = _by_size(report)
    if len(ordered) <= _LISTED:
        return fact_lines([(name, count, "") for name, count in ordered])
    half = _LISTED // 2
    lines = fact_lines([(name, count, "") for name, count in ordered[:half] + ordered[-half:]])
    return [*lines[:half], f"  ... {len(ordered) - 2 * half:,} more ...", *lines[half:]]


def _by_size(report: LabelReport) -> list[tuple[str, int]]:
    pairs = zip(report.classes, report.counts, strict=True)
    return sorted(pairs, key=lambda pair: -pair[1])


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def _pair(groups: Sequence[tuple[Path, ...]]) -> str:
    return " = ".join(f"{path.parent.name}/{path.name}" for path in groups[0][:3]) if groups else ""
