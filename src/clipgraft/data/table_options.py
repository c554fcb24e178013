"""How a table is to be read, where the user says so."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clipgraft.data.rows import Cells
from clipgraft.errors import ConfigError

QUOTING = ("auto", "minimal", "none")


@dataclass(frozen=True)
class TableOptions:
    """How a table is to be read; what is None is found out and said.

    Attributes:
        dataset_type: one of `tables.DATASET_TYPES`.
        image_key, caption_key: names of columns, or their numbers from 1; of captions several, by commas.
        separator: of the columns of a text table.
        encoding: of a text table.
        quoting: `minimal` is RFC 4180, `none` leaves double quotes as they are, `auto` finds out.
        image_root: folder that paths are relative to (default: that of the table).
        keep_nulls: whether captions such as nan, None and N/A are captions.
        numbers: whether numbers in the caption column are text.
    """

    dataset_type: str = "auto"
    image_key: str | None = None
    caption_key: str | None = None
    separator: str | None = None
    encoding: str | None = None
    quoting: str = "auto"
    image_root: Path | None = None
    keep_nulls: bool = False
    numbers: bool = False

    def __post_init__(self) -> None:
        if self.quoting not in QUOTING:
            raise ConfigError(f'--csv-quoting "{self.quoting}" is not one of {", ".join(QUOTING)}')
        if self.image_root is not None and not self.image_root.is_dir():
            raise ConfigError(f"--image-root {self.image_root}: there is no such folder; check the path")

    @property
    def cells(self) -> Cells:
        """What cells may hold."""
        return Cells(self.numbers, self.keep_nulls)
