"""Whole files or none: everything clipgraft writes goes to a temporary name, is synced, and is renamed."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from clipgraft.errors import DataError

_PARTIAL = ".partial"


def cache_folder() -> Path:
    """`$CLIPGRAFT_CACHE`, else `$XDG_CACHE_HOME/clipgraft`, else `~/.cache/clipgraft`."""
    if own := os.environ.get("CLIPGRAFT_CACHE"):
        return Path(own)
    # Unlike Path.expanduser, this raises nothing for an account without a home folder, as in some containers.
    shared, home = os.environ.get("XDG_CACHE_HOME", ""), Path(os.path.expanduser("~/.cache"))  # noqa: PTH111
    if Path(shared).is_absolute():
        home = Path(shared)
    elif not home.is_absolute():
        home = Path(tempfile.gettempdir())
    return home / "clipgraft"


def inside(folder: Path, name: str, record: Path | str = "", advice: str = "write it again") -> Path:
    """The path below `folder` that a record names; it must be there once links are followed.

    To be asked before anything that a file names is read, written or deleted: the file may be a stranger's.

    Raises:
        DataError: the name leads out of the folder; it names `record`, where the name was read.
    """
    path = PurePosixPath(name)
    kept = not (path.is_absolute() or ".." in path.parts or "\\" in name or PureWindowsPath(name).drive)
    try:
        if kept and (folder / path).resolve().is_relative_to(folder.resolve()):
            return folder / path
    except (OSError, RuntimeError, ValueError):  # links in a circle, a NUL
        pass
    where = f"{record}: names" if record else f"{folder}: its record names"
    raise DataError(f"{where} {name[:200]!r}, which is outside of {folder}; nothing was touched; {advice}")


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`; on success it is synced to disk and takes its name.

    Folders above `target` are made. After an exception nothing is left behind and an older `target` is
    untouched; after a kill the temporary file is left, for `sweep_partial`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(
        prefix=f".{target.name}.", suffix=f"{_PARTIAL}{target.suffix}", dir=target.parent
    )
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _sync_file(temporary)
        temporary.chmod(0o644)
        temporary.replace(target)
        _sync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a new folder beside `target`; on success its files are synced and it takes the name of `target`.

    Folders above `target` are made, and an older folder `target` is replaced as a whole. After an exception
    nothing is left behind and an older one is untouched; after a kill what is left is for `sweep_partial`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=_PARTIAL, dir=target.parent))
    try:
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                path.chmod(0o644)  # safetensors makes files that their owner alone may read
                _sync_file(path)
        temporary.chmod(0o755)
        _replace_folder(temporary, target)
        _sync_folder(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sweep_partial(folder: Path) -> None:
    """Remove what killed writers left below `folder`; nobody else may be writing there."""
    for leftover in folder.rglob(f".*{_PARTIAL}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def _replace_folder(new: Path, target: Path) -> None:
    """Give a folder the name of another, which is removed; no system call can do both at once."""
    if not target.exists():
        new.rename(target)
        return
    # Not named as a leftover: after a kill between the renames it is all there is.
    older = new.with_name(new.name.replace(_PARTIAL, ".older"))
    target.rename(older)
    try:
        new.rename(target)
    except BaseException:
        older.rename(target)
        raise
    shutil.rmtree(older)


def _sync_file(path: Path) -> None:
    with path.open("rb+") as written:
        os.fsync(written.fileno())


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable; only POSIX lets a folder be opened for that."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(target: Path, text: str) -> None:
    """Write UTF-8 text atomically; file names that are no UTF-8 are escaped."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(target: Path, value: Any) -> None:
    """Write indented UTF-8 JSON atomically."""
    write_text(target, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
