"""What img2dataset recorded of its downloads: in a Parquet file beside each tar file, or with the images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from clipgraft.errors import DataError
from clipgraft.readers import reading_parquet

_DONE = "success"
STATUS = "status"
_COLUMNS = {"key", STATUS, "error_message"}


def is_record(columns: Collection[str]) -> bool:
    """Tell whether a table has the columns in which img2dataset says what came of each download."""
    return set(columns) >= _COLUMNS


@dataclass
class Downloads:
    """Counts downloads by their status, and compares the keys of those that came with the tar files.

    Attributes:
        statuses: rows by `status`.
        lost: keys of images that came, and are in no tar file.
        unread: records that cannot be read, with the reason.
    """

    statuses: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)

    def take(self, status: object) -> bool:
        """Count a download, and tell whether its image came."""
        self.statuses[str(status)] += 1
        return status == _DONE

    def compare(self, archive: Path, images: Collection[str]) -> None:
        """Read the record of a tar file, if it has one, and compare it with the names of the images in it."""
        record = archive.with_suffix(".parquet")
        if not record.is_file():
            return
        try:
            with reading_parquet(record) as pyarrow:
                if not is_record(pyarrow.parquet.read_schema(record).names):
                    return
                table = pyarrow.parquet.read_table(record, columns=["key", STATUS], partitioning=None)
                table.validate(full=True)
                rows = zip(table.column("key").to_pylist(), table.column(STATUS).to_pylist(), strict=True)
                found = [(str(key), str(status)) for key, status in rows]
        except DataError as error:
            self.unread.append(str(error))
            return
        self.statuses.update(status for _, status in found)
        there = {PurePosixPath(name).name.partition(".")[0] for name in images}
        self.lost += [key for key, status in found if status == _DONE and key not in there]

    def notes(self) -> tuple[str, ...]:
        """Return one line with all downloads, whose numbers add up, and one for each irregularity."""
        lines = []
        if self.statuses:
            kinds = ", ".join(f"{count:,} {status}" for status, count in self.statuses.most_common(8))
            lines.append(f"img2dataset's record has {self.statuses.total():,} downloads: {kinds}")
        if self.lost:
            lines.append(
                f"{len(self.lost):,} images that came are in no tar file, such as {self.lost[0]}: download "
                "their tar file again"
            )
        if self.unread:
            lines.append(f"img2dataset's record was not read: {self.unread[0]}")
        return tuple(lines)
