"""One error for every file that cannot be written, whichever library writes it."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clipgraft.errors import ClipgraftError, WriteError

_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # which no reader gives
_REFUSED = (
    *(errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EBUSY, errno.ENOTEMPTY),
)
# What libraries that write by themselves say instead of an errno: safetensors and tokenizers name it, SQLite
# and FAISS quote it; torch, numpy and PIL only notice that less was written than should have been.
_SAID = (
    (re.compile(r"No space left on device|os error 28\b|database or disk is full"), errno.ENOSPC),
    (re.compile(r"[Qq]uota exceeded|os error 122\b"), errno.EDQUOT),
    (re.compile(r"File too large|os error 27\b"), errno.EFBIG),
    (re.compile(r"[Rr]ead-only file system|os error 30\b|readonly database"), errno.EROFS),
    (re.compile(r"Permission denied|os error 13\b|unable to open database file"), errno.EACCES),
    (re.compile(r"Input/output error|os error 5\b|disk I/O error"), errno.EIO),
    (
        re.compile(
            r"unexpected pos \d|PytorchStreamWriter failed|file write failed|iostream error|"
            r"\d+ requested and \d+ written|encoder error -?\d+ when writing"
        ),
        errno.EIO,
    ),
)


@contextmanager
def writing(target: Path, needs: int | None = None, temporary: Path | None = None) -> Iterator[None]:
    """Turn what any library raises where `target` cannot be written into one `WriteError`.

    Errors that have other reasons pass. `temporary` is where the bytes go meanwhile; `needs`, how many.
    """
    try:
        yield
    except WriteError as error:
        if temporary is None:
            raise
        # Of a file that was to become part of a folder: nobody knows where that was being made.
        what = error.what.replace(str(temporary), str(target))
        raise WriteError(what, error.advice.replace(str(temporary.absolute()), str(target.parent))) from error
    except ClipgraftError:
        raise
    except Exception as error:
        reason = _refusal(error, target if temporary is None else temporary)
        if reason is None:
            raise
        raise _write_error(target, reason, needs, temporary) from error


def size_of(value: Any) -> int:
    """Bytes of all tensors and arrays in nested mappings and sequences, which is nearly what a file needs."""
    if isinstance(value, Mapping):
        return sum(map(size_of, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(size_of, value))
    return int(getattr(value, "nbytes", 0))


def _refusal(error: BaseException, place: Path) -> int | None:
    """The errno of a refused write, found in an exception or what led to it; None for other faults."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno is not None:
            if seen.errno in _WRITING:
                return seen.errno
            if seen.errno in _REFUSED and _concerns(seen, place):
                return seen.errno
        else:
            for pattern, number in _SAID:
                if pattern.search(str(seen)):
                    return number
        seen = seen.__cause__ or seen.__context__
    return None


def _concerns(error: OSError, place: Path) -> bool:
    """Whether an error names the place that is written to, what is in it, or a folder above it."""
    names = [name for name in (error.filename, error.filename2) if isinstance(name, str | os.PathLike)]
    whole = place.absolute()
    return any((path := Path(name).absolute()) == whole or whole in path.parents for name in names) or any(
        Path(name).absolute() in whole.parents or Path(name).absolute().parent in whole.parents
        for name in names
    )


def _write_error(target: Path, reason: int, needs: int | None, temporary: Path | None) -> WriteError:
    folder = next(path for path in target.absolute().parents if os.path.isdir(path))  # noqa: PTH112
    room = _room(folder, temporary)
    if reason == errno.EIO and room is not None and room < max(needs or 0, 1 << 20):
        reason = errno.ENOSPC  # the libraries that name no reason
    if reason == errno.ENOSPC:
        known = [f"it needs {_megabytes(needs)}"] if needs else []
        if room is not None and room < (needs or 1 << 62):
            known.append(f"there is room for {_megabytes(room)}")
        wanted = f": {', and '.join(known)}" if known else ""
        return WriteError(
            f"cannot write {target}: no space left on the disk{wanted}",
            f"make room in {folder} or choose another place, then run it again",
        )
    size = f" (it needs {_megabytes(needs)})" if needs else ""
    if reason == errno.EDQUOT:
        return WriteError(
            f"cannot write {target}: your disk quota is used up{size}",
            "delete files or have it raised, then run it again",
        )
    if reason == errno.EFBIG:
        return WriteError(
            f"cannot write {target}: the file is larger than this system lets it be{size}",
            "see `ulimit -f`, or choose another disk, then run it again",
        )
    if reason == errno.EIO:
        return WriteError(
            f"cannot write {target}: the disk did not take all of it{size}",
            f"check the disk of {folder}, your quota and `ulimit -f`, then run it again",
        )
    return WriteError(
        f"cannot write {target}: {os.strerror(reason)}",
        f"choose another place, or let yourself write in {folder}, then run it again",
    )


def _room(folder: Path, temporary: Path | None) -> int | None:
    """Bytes that were free before anything was written."""
    gc.collect()  # an earlier write that failed may hold its deleted file open in a cycle of references
    with contextlib.suppress(OSError):
        own = 0
        if temporary is not None:
            files = [temporary, *temporary.rglob("*")]
            own = sum(path.stat().st_blocks * 512 for path in files if path.is_file())
        return shutil.disk_usage(folder).free + own
    return None


def _megabytes(count: int) -> str:
    """A number of bytes as people read it."""
    if count < 1_000_000:
        return f"{count / 1e3:.1f} KB"
    return f"{count / 1e9:.2f} GB" if count >= 10**9 else f"{count / 1e6:.1f} MB"
