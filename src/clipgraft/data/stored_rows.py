"""One item a row, wherever it lies: rows of memory-mapped files and of memory behind one index."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array: TypeAlias = npt.NDArray[Any]
Compute: TypeAlias = Callable[[Sequence[Path], Callable[[Tensor], None]], None]
"""compute(paths, add): call `add` with (n, *item) rows, batch after batch, in the order of `paths`."""


class StoredRows:
    """(N, *item) values of one dtype, read when they are asked for.

    `rows[ids]` is a tensor of its own, (n, *item) on the CPU, for an int64 tensor of ids (n,). Memory-mapped
    rows cost memory only while the system has it to spare.
    """

    def __init__(
        self,
        parts: Sequence[Array],
        part: npt.NDArray[np.int64],
        row: npt.NDArray[np.int64],
        dtype: torch.dtype,
    ) -> None:
        """Item `i` is `parts[part[i]][row[i]]`; bfloat16 parts are int16 arrays of the same bits."""
        self._parts = [np.asarray(array) for array in parts]
        self._part, self._row = part, row
        self.dtype = dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, *item)."""
        return (len(self), *self._parts[0].shape[1:])

    def __len__(self) -> int:
        return len(self._part)

    def __getitem__(self, ids: Tensor) -> Tensor:
        wanted = ids.cpu().numpy()
        part, row = self._part[wanted], self._row[wanted]
        found = np.empty((len(wanted), *self.shape[1:]), self._parts[0].dtype)
        order = np.argsort(part, kind="stable")
        for mine in np.split(order, np.flatnonzero(np.diff(part[order])) + 1):
            if len(mine):
                found[mine] = self._parts[part[mine[0]]][row[mine]]
        return to_tensor(found, self.dtype)

    def tensor(self) -> Tensor:
        """All rows, (N, *item). Rows that lie in order in one file stay there, mapped copy-on-write."""
        first, start = self._part[0], self._row[0]
        in_order = np.arange(start, start + len(self))
        if (self._part == first).all() and np.array_equal(self._row, in_order):
            return to_tensor(self._parts[first][start : start + len(self)], self.dtype)
        return self[torch.arange(len(self))]


def computed_rows(paths: Sequence[Path], compute: Compute, dtype: torch.dtype) -> StoredRows:
    """Rows that are kept in memory alone, (len(paths), *item)."""
    arrays: list[Array] = []
    compute(paths, lambda rows: arrays.append(to_array(rows, dtype)))
    return _in_order(np.concatenate(arrays), dtype)


def rows_in_memory(rows: Tensor) -> StoredRows:
    """Rows of a tensor, (N, *item)."""
    return _in_order(to_array(rows, rows.dtype), rows.dtype)


def _in_order(whole: Array, dtype: torch.dtype) -> StoredRows:
    return StoredRows([whole], np.zeros(len(whole), np.int64), np.arange(len(whole)), dtype)


def to_tensor(array: Array, dtype: torch.dtype) -> Tensor:
    """An array as a tensor over the same memory; bfloat16, which numpy lacks, comes as int16 of its bits."""
    tensor = torch.from_numpy(array)
    return tensor.view(dtype) if tensor.dtype != dtype else tensor


def array_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """What `to_array` makes of a dtype."""
    made: np.dtype[Any] = to_array(torch.empty(0), dtype).dtype
    return made


def to_array(tensor: Tensor, dtype: torch.dtype) -> Array:
    """A tensor cast to `dtype` as an array on the CPU; bfloat16 as int16 of the same bits."""
    cast = tensor.detach().to("cpu", dtype).contiguous()
    array: Array = (cast.view(torch.int16) if dtype == torch.bfloat16 else cast).numpy()
    return array
