"""A few files, and a feature cache that is to know them."""

from __future__ import annotations

from pathlib import Path

import pytest

from clipgraft.data.feature_cache import FeatureCache
from feature_caches import ROW_BYTES


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Seven files."""
    paths = [tmp_path / "images" / f"{number}.png" for number in range(7)]
    paths[0].parent.mkdir()
    for number, path in enumerate(paths):
        path.write_text(str(number))
    return paths


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    """A cache that writes a shard after every two batches of two."""
    return FeatureCache(tmp_path / "cache", shard_bytes=4 * ROW_BYTES)
