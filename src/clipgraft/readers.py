"""One guard around every library that opens a file: whatever it raises becomes one line that names the file.

Readers such as pyarrow, numpy, tarfile, FAISS, safetensors and torch raise almost any type on damaged bytes
(KeyError, UnicodeDecodeError, OverflowError, struct.error, …), so that a list of types is never whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clipgraft.errors import ClipgraftError, DataError

_MOST_REASON = 160


@contextmanager
def reading(path: str | Path, error: type[ClipgraftError] = DataError, advice: str = "") -> Iterator[None]:
    """Turn what a library raises inside into `error`: the file, the reason in one line, and what to do.

    Only calls of the library belong inside: a fault of ours would be taken for one of the file.
    """
    try:
        yield
    except ClipgraftError:
        raise
    except Exception as cause:
        raise error(f"{path}: cannot be read ({reason(cause)}){advice and '; '}{advice}") from cause


def reason(cause: BaseException) -> str:
    """Why something failed, as a library says it, in one printable line."""
    told = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)
    line = " ".join("".join(c if c.isprintable() else " " for c in told[: 4 * _MOST_REASON]).split())
    if isinstance(cause, KeyError | RecursionError | MemoryError) or not line:
        line = f"{type(cause).__name__} {line}".strip()
    return line if len(line) <= _MOST_REASON else f"{line[:_MOST_REASON]}…"


def map_array(path: Path, error: type[ClipgraftError] = DataError, advice: str = "", mode: str = "r") -> Any:
    """A `.npy` file, memory-mapped; no other kind of file, and no array of Python objects."""
    from numpy.lib.format import open_memmap

    with reading(path, error, advice):
        return open_memmap(path, mode=mode)


def read_parquet(content: Path | bytes, path: Path, columns: Sequence[str] | None, advice: str) -> Any:
    """A whole Parquet table, or some of its columns, each of whose values can be taken out of it."""
    import pyarrow
    import pyarrow.parquet

    with reading(path, DataError, advice):
        source = pyarrow.BufferReader(content) if isinstance(content, bytes) else content
        table = pyarrow.parquet.read_table(source, columns=columns, partitioning=None)
        table.validate(full=True)  # text that is not UTF-8, offsets that lead out of the column
        return table
