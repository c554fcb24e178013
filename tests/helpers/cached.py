"""A stand-in for a tower, and what tests of the feature cache ask of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from clipgraft.data.feature_cache import FeatureCache, FeatureKey

KEY = FeatureKey("tower", "resize", "image features", "float32")
ROW_BYTES = 4 * 4


class Encoder:
    """Stands for a tower: the row of a file is its number, four times; remembers what it was asked for."""

    def __init__(self, batch: int = 2, after_batch: Callable[[], None] = lambda: None) -> None:
        self.asked: list[str] = []
        self.batch = batch
        self.after_batch = after_batch

    def __call__(self, paths: Sequence[Path], add: Callable[[Tensor], None]) -> None:
        with torch.inference_mode():
            for start in range(0, len(paths), self.batch):
                part = paths[start : start + self.batch]
                self.asked += [path.name for path in part]
                add(rows_of(part))
                self.after_batch()


def rows_of(paths: Sequence[Path]) -> Tensor:
    """What every path's row must be."""
    return torch.tensor([float(path.read_text()) for path in paths])[:, None].expand(-1, 4) / 7


def shards(cache: FeatureCache, suffix: str = ".npy", key: FeatureKey = KEY) -> list[Path]:
    """The files of an entry, oldest first."""
    found = list((cache.folder / key.digest).glob(f"*{suffix}"))
    return sorted(found, key=lambda path: path.stat().st_mtime_ns)


def ask(
    cache: FeatureCache, paths: Sequence[Path], key: FeatureKey = KEY, encoder: Encoder | None = None
) -> tuple[Tensor, list[str]]:
    """The rows, and which files were encoded for them."""
    encoder = encoder or Encoder()
    return cache.get_or_compute(key, paths, encoder).tensor(), encoder.asked


def names(paths: Sequence[Path]) -> list[str]:
    return [path.name for path in paths]
