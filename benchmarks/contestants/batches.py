"""Data loading of the peers, as their documentation shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

Collate = Callable[[list[Any]], Any]


class Photos(Dataset[Any]):
    """Dataset of (transformed image, caption); the loader's workers decode and transform."""

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
    """Yield endless batches in clipgraft's order: a new permutation for every (seed, epoch)."""
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
    """Make a stock DataLoader over the rows, shuffled and endless."""
    sampler: Any = _Batches(len(rows), batch_size, seed)
    return DataLoader(Photos(rows, transform), batch_sampler=sampler, num_workers=workers, collate_fn=collate)
