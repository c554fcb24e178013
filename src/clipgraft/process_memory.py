"""Give memory back to the system: freed heap, and pages of mapped files that nobody wrote to.

Linux alone; elsewhere nothing is given back, which costs memory and changes nothing else.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys
from collections.abc import Callable, Iterable

import numpy as np
from torch import Tensor

_PAGEMAP = "/proc/self/pagemap"
_ENTRY = 8  # bytes a page in it
_SWAPPED, _OF_FILE, _PRESENT = 62, 61, 63  # bits of an entry, see the kernel's admin-guide/mm/pagemap.rst
_DONTNEED = 4


def trim_heap() -> None:
    """Return freed heap memory to the system; glibc alone keeps it."""
    if (trim := _libc("malloc_trim")) is not None:
        trim(0)


def drop_mapped(tensors: Iterable[Tensor]) -> None:
    """Drop the resident pages of tensors on the CPU that lie in a mapped file; they are read again when used.

    A tensor that was written to, or that lies in ordinary memory, is left alone: the kernel tells which pages
    are still the file's.
    """
    advise = _libc("madvise")
    if advise is None:
        return
    try:
        pages = os.open(_PAGEMAP, os.O_RDONLY)
    except OSError:  # a sandbox without it
        return
    try:
        for tensor in tensors:
            _drop(tensor, pages, advise)
    finally:
        os.close(pages)


def _drop(tensor: Tensor, pages: int, advise: Callable[..., int]) -> None:
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return
    size = mmap.PAGESIZE
    first, last = -(-tensor.data_ptr() // size), (tensor.data_ptr() + tensor.nbytes) // size
    if last <= first:
        return
    raw = os.pread(pages, (last - first) * _ENTRY, first * _ENTRY)
    if len(raw) == (last - first) * _ENTRY and _are_the_files(np.frombuffer(raw, dtype=np.uint64)):
        advise(ctypes.c_void_p(first * size), ctypes.c_size_t((last - first) * size), _DONTNEED)


def _are_the_files(entries: np.ndarray[tuple[int, ...], np.dtype[np.uint64]]) -> bool:
    """Whether pages are not in memory at all, or there as a file has them; a written one is neither."""
    present, swapped, of_file = (
        (entries >> np.uint64(bit)) & np.uint64(1) for bit in (_PRESENT, _SWAPPED, _OF_FILE)
    )
    return not swapped.any() and bool((of_file >= present).all())


@functools.cache
def _libc(name: str) -> Callable[..., int] | None:
    """A function of the C library; None where there is none, or another system."""
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), name, None)
