"""The peers' side of data loading: what their own documentation tells a user to write."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

Collate = Callable[[list[Any]], Any]


class Photos(Dataset[Any]):
    """(transformed image, caption) of row i; decoding and transforming happen in the loader's workers."""

    def __init__(self, rows: Sequence[tuple[Path, str]], transform: Callable[[Image.Image], Any]) -> None:
        self.rows = rows
        self.transform = transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, str]:
        path, caption = self.rows[index]
        with Image.open(path) as image:
            return self.transform(image.convert("RGB")), caption


def shuffled(number: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches in the order that clipgraft draws: a new permutation for every (seed, epoch)."""
    epoch = 0
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(number).tolist()
        for start in range(0, number - number % batch_size, batch_size):
            yield order[start : start + batch_size]
        epoch += 1


class _Batches:
    """A batch sampler that never ends."""

    def __init__(self, number: int, batch_size: int, seed: int) -> None:
        self._arguments = (number, batch_size, seed)

    def __iter__(self) -> Iterator[list[int]]:
        return shuffled(*self._arguments)


def loader(
    rows: Sequence[tuple[Path, str]],
    transform: Callable[[Image.Image], Any],
    collate: Collate,
    *,
    batch_size: int,
    workers: int,
    seed: int = 0,
) -> DataLoader[Any]:
    """A stock DataLoader over the rows, shuffled, without end."""
    sampler: Any = _Batches(len(rows), batch_size, seed)
    return DataLoader(Photos(rows, transform), batch_sampler=sampler, num_workers=workers, collate_fn=collate)
