"""What every consumer's module gives, and whose tables may be written to."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol
from uuid import UUID

from clipgraft.errors import DataError
from clipgraft.ours import MARK
from clipgraft.search.export.target import Target
from clipgraft.search.manifest import Dtype

_TOLD = {
    "kind": "kind",
    "fingerprint": "base",
    "adapter_digest": "adapter",
    "preprocessing": "preprocessing",
    "dtype": "dtype",
    "dim": "dim",
    "source": "source",
}
"""What must be the same for rows to be updated, and which entry of the mark says so to a reader."""


class VectorSink(Protocol):
    """A table, collection or file that is being written to.

    Attributes:
        whole: whether it takes all rows anew, not only those that have changed.
    """

    whole: bool

    def stored(self) -> Iterator[tuple[Sequence[UUID], Sequence[str]]]:
        """Yield the ids and digests of the rows of ours, some at a time."""

    def write(self, batches: Iterator[Any]) -> None:
        """Add rows, pyarrow RecordBatches; those with a known id replace what is there."""

    def remove(self, ids: Sequence[str]) -> None:
        """Delete rows."""

    def finish(self) -> tuple[int, str]:
        """Complete the table; returns how many rows of ours it has now, and what is to be said of it."""


@dataclass(frozen=True)
class Job:
    """What a sink is opened for.

    Attributes:
        target: the place.
        schema: pyarrow schema of the rows.
        dtype, dim: of the vectors.
        mark: what the table says of itself (`rows.mark_of`).
        overwrite: the user has said that what is there may go.
    """

    target: Target
    schema: Any
    dtype: Dtype
    dim: int
    mark: Mapping[str, Any]
    overwrite: bool

    def continues(self, found: Any) -> bool:
        """Whether the rows of a table that is there can be updated; otherwise it is to be replaced.

        Args:
            found: the mark of that table, as text, None where it has none.

        Raises:
            DataError: it may not be replaced.
        """
        before = _read_mark(found)
        different = [name for name in _TOLD if before.get(name) != self.mark[name]] if before else []
        if before and not different:
            return True
        if self.overwrite:
            return False
        if not before:
            raise DataError(
                f"{self.target}: is there already, was not made by clipgraft, and is left as it is; name "
                "another, or say `overwrite=True`"
            )
        told = _TOLD[different[0]]
        raise DataError(
            f"{self.target}: holds vectors of {told} {before.get(told)}, and these are of {told} "
            f"{self.mark[told]}; name another, or say `overwrite=True`"
        )


def _read_mark(found: Any) -> dict[str, Any]:
    try:
        mark = json.loads(found) if isinstance(found, str | bytes) else None
    except (ValueError, RecursionError):
        return {}
    return mark if isinstance(mark, dict) and mark.get("made_by") == MARK else {}


_MODULES = {"parquet": "parquet", "lancedb": "lance", "qdrant": "qdrant", "pgvector": "pgvector"}


def open_sink(job: Job) -> AbstractContextManager[VectorSink]:
    """Open what a job writes to; raises DataError where a package is missing or the place is not ours."""
    sink: AbstractContextManager[VectorSink] = _module(job.target).opened(job)
    return sink


def need_packages(target: Target) -> None:
    """Import what a target needs; raises DataError where it is not installed."""
    _module(target).need()


def _module(target: Target) -> Any:
    return importlib.import_module(f"clipgraft.search.export.{_MODULES[target.kind]}")
