"""One guard around every library that opens a file: whatever it raises becomes one line that names the file.

Readers such as pyarrow, numpy, tarfile, FAISS, safetensors and torch raise almost any type on damaged bytes
(KeyError, UnicodeDecodeError, OverflowError, struct.error, …), so that a list of types is never whole.

YAML of strangers is read within bounds: aliases of aliases double with each line, so that some lines stand
for gigabytes, and deep nesting ends in a RecursionError.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clipgraft.errors import ClipgraftError, DataError
from clipgraft.shown import shown_line

POINTER = (
    "it is a git-lfs pointer, not the file itself, which was never downloaded: run `git lfs pull` in that "
    "repository, or download the file from its page"
)
_LFS = b"version https://git-lfs.github.com/spec/"
_PAGES = (b"<!doctype", b"<html", b"<?xml")
_MOST_REASON = 160
_MOST_BYTES, _LAST_SECOND = 1 << 62, 1 << 40


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
    line = shown_line(" ".join(told[: 4 * _MOST_REASON].split()))
    if isinstance(cause, KeyError | RecursionError | MemoryError) or not line:
        line = f"{type(cause).__name__} {line}".strip()
    return line if len(line) <= _MOST_REASON else f"{line[:_MOST_REASON]}…"


def placeholder(path: Path) -> str:
    """What stands in place of a file that was not downloaded: a git-lfs pointer, a web page; "" if none."""
    try:
        with path.open("rb") as file:
            start = file.read(200)
    except OSError:
        return ""
    if is_pointer(start):
        return POINTER
    if start.lstrip().lower().startswith(_PAGES):
        return "it is damaged: a web page stands in its place, as where a login was needed; download it again"
    return ""


def is_pointer(source: str | Path | bytes) -> bool:
    """Whether a file, or its content, is what git keeps in place of a file that git-lfs was to fetch."""
    if isinstance(source, bytes):
        return source.startswith(_LFS)
    try:
        with Path(source).open("rb") as file:
            return file.read(len(_LFS)) == _LFS
    except OSError:
        return False


def map_array(path: Path, error: type[ClipgraftError] = DataError, advice: str = "", mode: str = "r") -> Any:
    """A `.npy` file, memory-mapped; no other kind of file, and no array of Python objects."""
    from numpy.lib.format import open_memmap

    with reading(path, error, advice):
        return open_memmap(path, mode=mode)


class Tar(tarfile.TarFile):
    """A tar file that raises TarError alone, whose members have a size and a time that can be kept."""

    def next(self) -> tarfile.TarInfo | None:
        """The next member; None at the end."""
        try:
            member = super().next()
        except tarfile.TarError:
            raise
        except Exception as cause:  # ValueError, OverflowError, UnicodeDecodeError, … of damaged headers
            raise tarfile.ReadError(reason(cause)) from cause
        if member is None:
            return None
        if not (0 <= member.size < _MOST_BYTES and 0 <= member.offset_data < _MOST_BYTES):
            raise tarfile.ReadError(f"{member.name[:200]!r} claims to have {member.size} bytes")
        if not -_LAST_SECOND < member.mtime < _LAST_SECOND:  # NaN is not either
            raise tarfile.ReadError(f"{member.name[:200]!r} claims to be of second {member.mtime}")
        if member.issparse():
            raise tarfile.ReadError(f"{member.name[:200]!r} has holes; pack it again without holes")
        return member


@contextmanager
def reading_parquet(path: Path, state: str = "is not a whole Parquet file") -> Iterator[Any]:
    """Yield pyarrow; what it raises inside names the file.

    Raises:
        DataError: pyarrow is not installed, or raised something.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        missing = "reading Parquet needs pyarrow: pip install 'clipgraft[parquet]'"
        raise DataError(f"{path}: {missing}") from error
    try:
        yield pyarrow
    except ClipgraftError:
        raise
    except Exception as cause:
        raise DataError(f"{path}: {state} ({reason(cause)}); write it again") from cause


def read_parquet(content: Path | bytes, path: Path, columns: Sequence[str] | None, advice: str) -> Any:
    """A whole Parquet table, or some of its columns, each of whose values can be taken out of it."""
    import pyarrow
    import pyarrow.parquet

    with reading(path, DataError, advice):
        source = pyarrow.BufferReader(content) if isinstance(content, bytes) else content
        table = pyarrow.parquet.read_table(source, columns=columns, partitioning=None)
        table.validate(full=True)  # text that is not UTF-8, offsets that lead out of the column
        return table


_LONGEST_YAML = 4_000_000
_MOST_YAML_VALUES = 200_000  # with what aliases stand for
_DEEPEST_YAML = 20


def load_yaml(path: Path, loader: type[Any], error: type[ClipgraftError], label: str) -> Any:
    """The one document of a file, by a PyYAML loader class.

    Raises:
        error: the file cannot be read, is no YAML, or is larger or deeper than settings are; it begins with
            `label`.
    """
    import yaml

    try:
        with path.open("rb") as file:
            content = file.read(_LONGEST_YAML + 1)
    except OSError as cause:
        raise error(f"{label}: cannot be read: {cause.strerror}; check the path") from cause
    try:
        text = content.decode("utf-8-sig")
        fault = _too_large(content) or _too_deep(yaml.parse(text, loader))
        if not fault:
            node = yaml.compose(text, loader)
            fault = _expands(node)
        if not fault:
            return yaml.load(text, loader)
    except ClipgraftError:
        raise
    except Exception as cause:  # ValueError, OverflowError, KeyError, … of constructors, beside YAMLError
        raise error(f"{label} is not YAML: {reason(cause)}; correct it") from cause
    raise error(f"{label}: {fault}; write it out in plain lines")


def _too_large(content: bytes) -> str:
    return f"is larger than {_LONGEST_YAML:,} bytes" if len(content) > _LONGEST_YAML else ""


def _too_deep(events: Any) -> str:
    """Looked for among the parser's events, which come without recursion."""
    import yaml

    depth = 0
    for event in events:
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST_YAML:
            return f"has more than {_DEEPEST_YAML} levels"
    return ""


def _expands(root: Any) -> str:
    """Whether aliases stand for too much, or for what they are in."""
    import yaml

    sizes: dict[int, int] = {}

    def size(node: Any, above: frozenset[int]) -> int:
        if id(node) in above:
            return _MOST_YAML_VALUES + 1
        if id(node) not in sizes:
            parts: list[Any] = []
            if isinstance(node, yaml.MappingNode):
                parts = [part for pair in node.value for part in pair]
            elif isinstance(node, yaml.SequenceNode):
                parts = node.value
            below = above | {id(node)} if parts else above
            sizes[id(node)] = 1 + sum(size(part, below) for part in parts)
        return sizes[id(node)]

    most = 0 if root is None else size(root, frozenset())
    return (
        f"has more than {_MOST_YAML_VALUES:,} values, aliases (*name) counted"
        if most > _MOST_YAML_VALUES
        else ""
    )
