"""Weights that stay in the file that they are loaded from, mapped instead of copied.

A mapped weight takes memory while it is used, and only once for all processes that use the same file. What is
written to it is the process's own and never reaches the file.

The system reads pages of such a file whenever they are needed, so not every file may be mapped:

- Linux only. Windows refuses to replace or delete a mapped file.
- On a local disk only: a network mount that goes away would end the process with a bus error.
- A file that is replaced by renaming, or deleted, stays as it was for those that have it open. One that is
  written to in place does not: `check_unchanged`, which encoding asks before every pass, refuses to go on.

Small weights are copied: they share pages with others, and a copy costs nothing.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipgraft.errors import ModelError

_FILES = "_clipgraft_files"
_SMALLEST = 64 << 10  # bytes of a weight that is mapped
_MOUNTS = Path("/proc/self/mountinfo")
_LOCAL = frozenset(
    {"btrfs", "erofs", "ext2", "ext3", "ext4", "f2fs", "overlay", "squashfs", "tmpfs", "xfs", "zfs"}
)


class OpenedFile:
    """A file of weights that is held open, so that a change of it in place is seen.

    Attributes:
        path: where it was opened.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError where there is no such file."""
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        self._was = os.fstat(self._descriptor)

    @property
    def is_at_its_path(self) -> bool:
        """Whether its path still leads to it."""
        now = self.path.stat()
        return (now.st_dev, now.st_ino) == (self._was.st_dev, self._was.st_ino)

    @property
    def unchanged(self) -> bool:
        """Whether nobody wrote to it since it was opened."""
        now = os.fstat(self._descriptor)
        return (now.st_size, now.st_mtime_ns) == (self._was.st_size, self._was.st_mtime_ns)


def open_to_map(path: Path) -> OpenedFile | None:
    """Open a file whose tensors may stay in it; None for one that is to be copied."""
    if sys.platform != "linux" or _filesystem(path) not in _LOCAL:
        return None
    return OpenedFile(path)


def _filesystem(path: Path) -> str:
    """The type of the file system that a file is on, by the kernel's list of mounts; empty if unknown."""
    try:
        lines = _MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines()
        where = path.resolve(strict=True)
    except (OSError, RuntimeError):
        return ""
    found, longest = "", -1
    for line in lines:
        mount, _, system = line.partition(" - ")
        point = Path(mount.split()[4].replace("\\040", " "))
        # The last of several mounts on one point hides the others.
        if where.is_relative_to(point) and len(point.parts) >= longest:
            found, longest = system.split()[0], len(point.parts)
    return found


class Adopted:
    """Chooses which tensors of a file a model's weights may be, in place of copies."""

    def __init__(self, files: Sequence[OpenedFile], weights: Iterable[Tensor]) -> None:
        """`weights` are the model's own, of which each may become a tensor of a file."""
        self._files = tuple(files)
        self._own = {id(weight) for weight in weights if isinstance(weight, nn.Parameter)} if files else set()
        self._taken: list[tuple[int, int]] = []

    def take(self, weight: Tensor, value: Tensor) -> bool:
        """Make `value` the weight itself; False, and nothing done, where it has to be copied.

        A file may say anything of its tensors: one that is not laid out as a weight is, or that shares bytes
        with another, is copied.
        """
        same = value.shape == weight.shape and value.dtype == weight.dtype and value.device == weight.device
        if id(weight) not in self._own or not same or value.nbytes < _SMALLEST:
            return False
        if type(value) is not Tensor or not value.is_contiguous() or value.requires_grad:
            return False
        start, stop = value.data_ptr(), value.data_ptr() + value.nbytes
        if start % value.element_size() or any(a < stop and start < b for a, b in self._taken):
            return False
        weight.data = value
        self._taken.append((start, stop))
        return True

    def keep(self, model: nn.Module) -> None:
        """Let the model remember the files that it has weights in."""
        if self._taken:
            object.__setattr__(model, _FILES, _Files(self._files + _files(model), tuple(self._taken)))


@dataclass(frozen=True)
class _Files:
    """Files that a model has weights in, and where; copies and pickles of the model have none."""

    opened: tuple[OpenedFile, ...] = ()
    spans: tuple[tuple[int, int], ...] = ()

    def __reduce__(self) -> tuple[type[_Files], tuple[()]]:
        return _Files, ()


def _files(model: nn.Module) -> tuple[OpenedFile, ...]:
    known: Any = getattr(model, _FILES, None)
    return known.opened if isinstance(known, _Files) else ()


def check_unchanged(model: nn.Module) -> None:
    """Refuse to go on with weights that lie in a file that was written to since.

    Raises:
        ModelError: with the file, and what to do.
    """
    for file in _files(model):
        if not file.unchanged and _lies_in_files(model):
            raise ModelError(
                f"{file.path} was written to while its weights were in use: what is computed from here on "
                "would be of no one model; start again, and replace such a file by renaming a new one"
            )


def _lies_in_files(model: nn.Module) -> bool:
    """Whether any weight still is where its file was mapped, and none moved to a GPU or another type."""
    spans = set(getattr(model, _FILES).spans)
    return any((p.data_ptr(), p.data_ptr() + p.nbytes) in spans for p in model.parameters())


@torch.no_grad()
def copy_from_files(model: nn.Module) -> None:
    """Copy weights that lie in files into memory: for a process that is to outlive any change of these."""
    if not _files(model):
        return
    check_unchanged(model)
    spans = set(getattr(model, _FILES).spans)
    for weight in model.parameters():
        if (weight.data_ptr(), weight.data_ptr() + weight.nbytes) in spans:
            weight.data = weight.detach().clone()
    object.__setattr__(model, _FILES, _Files())
