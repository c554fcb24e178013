"""Whole files or none: what clipgraft writes is made in a staging folder, synced, and then put in its place.

A staging folder lies beside its target, `.NAME.1a2b3c4d.partial`, and is locked as long as its process lives.
What a killed process left is removed by whoever writes the same target next, or by `sweep_partial`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from clipgraft.errors import DataError
from clipgraft.locks import LOCK, Lock, acquire
from clipgraft.shown import shown
from clipgraft.writing import writing

_PARTIAL = ".partial"
_STAGING = re.compile(r"\..+\.[0-9a-f]{8}\.partial", re.DOTALL)
_NEW, _OLD = "new", "old"
_LONGEST_STEM = 200  # bytes: names of files have at most 255


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
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                (folder / path).stat()  # Python 3.13 resolves links in a circle to themselves
            return folder / path
    except (OSError, RuntimeError, ValueError):  # links in a circle, a NUL
        pass
    where = f"{record}: names" if record else f"{folder}: its record names"
    raise DataError(f"{where} {name[:200]!r}, which is outside of {folder}; nothing was touched; {advice}")


def path_exists(name: str | Path) -> bool:
    """Tell whether there is a file or folder of this name, which a stranger may have written.

    `Path.exists`, `is_file` and `is_dir` raise for a name that is too long for any file.
    """
    return os.path.exists(name)  # noqa: PTH110


def file_exists(name: str | Path) -> bool:
    """Tell whether there is a file of this name; as `path_exists`."""
    return os.path.isfile(name)  # noqa: PTH113


def folder_exists(name: str | Path) -> bool:
    """Tell whether there is a folder of this name; as `path_exists`."""
    return os.path.isdir(name)  # noqa: PTH112


@contextmanager
def atomic_path(target: Path, needs: int | None = None) -> Iterator[Path]:
    """Yield a temporary path; on success the file there is synced to disk and takes the name `target`.

    Folders above `target` are made. After an exception nothing is left behind and an older `target` is
    untouched. `needs` is how many bytes are to be written, for messages.

    Raises:
        WriteError: there is no room, or the place does not let itself be written to.
    """
    with _staging(target) as temporary, writing(target, needs, temporary):
        # Made here, so that the system gives it the permissions of the user's umask.
        os.close(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666))
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        _finish_file(temporary, mode)
        temporary.replace(target)
        _sync_folder(target.parent)


@contextmanager
def atomic_folder(target: Path, needs: int | None = None) -> Iterator[Path]:
    """Yield a new folder; on success its files are synced and it takes the name `target`.

    Folders above `target` are made, and an older folder `target` is replaced as a whole: whenever the process
    is killed, the old or the new one is there. Otherwise as `atomic_path`.
    """
    with _staging(target) as temporary, writing(target, needs, temporary):
        temporary.mkdir()
        mode = stat.S_IMODE(temporary.stat().st_mode) & 0o666
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                _finish_file(path, mode)
        _replace_folder(temporary, target)
        _sync_folder(target.parent)


def sweep_partial(folder: Path) -> None:
    """Remove what killed writers left in or below `folder`; what living ones are at work on stays."""
    for path in list(folder.rglob(f".*{_PARTIAL}")):
        if _STAGING.fullmatch(path.name):
            _sweep(path)


def is_partial(path: Path) -> bool:
    """Whether a path is a staging folder, of a living writer or left by a killed one."""
    return _STAGING.fullmatch(path.name) is not None and path.is_dir()


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A free path with the name of `target` in a locked folder beside it; both are gone afterwards."""
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep_beside(target)
        staging, lock = _make_staging(target)
    try:
        yield staging / _NEW / target.name
    finally:
        _remove(staging, lock)


def _make_staging(target: Path) -> tuple[Path, Lock]:
    while True:
        staging = target.with_name(f".{_stem(target)}.{secrets.token_hex(4)}{_PARTIAL}")
        staging.mkdir()
        lock = None
        try:
            lock = acquire(staging / LOCK)
            if lock is not None:
                (staging / _NEW).mkdir()
                return staging, lock
        except FileNotFoundError:  # taken for a leftover, and removed, before it was locked
            continue
        except BaseException:
            if lock is not None:
                lock.release()
            shutil.rmtree(staging, ignore_errors=True)
            raise


def _stem(target: Path) -> str:
    """What names of staging folders have in their middle."""
    name = os.fsencode(target.name)
    return target.name if len(name) <= _LONGEST_STEM else hashlib.sha256(name).hexdigest()[:32]


def _sweep_beside(target: Path) -> None:
    """Remove what killed writers of the same target left."""
    start = f".{_stem(target)}."
    with contextlib.suppress(OSError), os.scandir(target.parent) as entries:
        for name in [entry.name for entry in entries if entry.name.startswith(start)]:
            if _STAGING.fullmatch(name) and len(name) == len(start) + 8 + len(_PARTIAL):
                _sweep(target.parent / name)


def _sweep(staging: Path) -> None:
    """Remove a staging folder that no living process holds, after putting back what it took away."""
    if staging.is_symlink() or not staging.is_dir():
        return
    if not (staging / LOCK).is_file():
        with contextlib.suppress(OSError):
            staging.rmdir()  # killed before it was locked; with anything in it, it is not ours
        return
    with contextlib.suppress(OSError):
        lock = acquire(staging / LOCK)
        if lock is None:
            return
        if not lock.real:
            lock.release(remove=False)
            return
        for older in (staging / _OLD).glob("*"):
            if not os.path.lexists(staging.parent / older.name):  # killed between the two renames
                older.rename(staging.parent / older.name)
        _remove(staging, lock)


def _remove(staging: Path, lock: Lock) -> None:
    """The lock goes last: a kill in between leaves what the next one still knows as a leftover."""
    removed = False
    try:
        for part in (_NEW, _OLD):
            shutil.rmtree(staging / part, ignore_errors=True)
        removed = True
    finally:
        lock.release(remove=removed)
    with contextlib.suppress(OSError):
        staging.rmdir()


def _replace_folder(new: Path, target: Path) -> None:
    """Give a folder the name of another, which is removed with the staging folder."""
    if not os.path.lexists(target):
        new.rename(target)
    elif not _exchange(new, target):
        older = new.parent.with_name(_OLD) / target.name
        older.parent.mkdir()
        target.rename(older)
        try:
            new.rename(target)
        except BaseException:
            older.rename(target)
            raise


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change their names at once, where the system can; False where it cannot."""
    rename = _renameat2()
    if rename is None:
        return False
    here, exchange = -100, 2
    if rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


@functools.cache
def _renameat2() -> Callable[..., int] | None:
    """Linux's call, as the C library has it since 2018."""
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    return function


def _finish_file(path: Path, mode: int) -> None:
    """Sync a file and give it permissions: safetensors makes files that their owner alone may read."""
    path.chmod(mode)
    _sync_file(path)


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
    data = text.encode("utf-8", errors="backslashreplace")
    with atomic_path(target, len(data)) as temporary:
        temporary.write_bytes(data)


def write_json(target: Path, value: Any) -> None:
    """Write indented UTF-8 JSON atomically; control and direction characters are written out."""
    write_text(target, shown(json.dumps(value, indent=2, ensure_ascii=False)) + "\n")
