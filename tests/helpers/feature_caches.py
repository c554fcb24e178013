"""A fake image encoder that records which files it was given, and helpers to look into a feature cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from clipgraft.data.feature_cache import FeatureCache, FeatureKey

KEY = FeatureKey("tower", "resize", "image features", "float32")
ROW_BYTES = 4 * 4


class Encoder:
    """A fake image encoder: the row of a file that holds N is N / 7, four times; `asked` lists the files."""

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
    """The rows that `Encoder` gives for these files."""
    return torch.tensor([float(path.read_text()) for path in paths])[:, None].expand(-1, 4) / 7


def shards(cache: FeatureCache, suffix: str = ".npy", key: FeatureKey = KEY) -> list[Path]:
    """The files of an entry, oldest first."""
    found = list((cache.folder / key.digest).glob(f"*{suffix}"))
    return sorted(found, key=lambda path: path.stat().st_mtime_ns)


def ask(
    cache: FeatureCache, paths: Sequence[Path], key: FeatureKey = KEY, encoder: Encoder | None = None
) -> tuple[Tensor, list[str]]:
    """Get rows from the cache; returns them and the names of the files that had to be encoded."""
    encoder = encoder or Encoder()
    return cache.get_or_compute(key, paths, encoder).tensor(), encoder.asked


def names(paths: Sequence[Path]) -> list[str]:
    return [path.name for path in paths]
