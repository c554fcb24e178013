"""Split pairs by image into training, validation and test data, without leaks between them."""

from __future__ import annotations

import csv
import io
import os
import random
from collections.abc import Sequence
from pathlib import Path

from clipgraft.data.datasets import Pairs
from clipgraft.data.examine import joined
from clipgraft.errors import ConfigError, DataError
from clipgraft.files import write_text

PARTS = ("train", "val", "test")


def check_shares(shares: Sequence[float]) -> tuple[float, ...]:
    """Return shares that sum to 1, of two or three parts: (80, 10, 10) -> (0.8, 0.1, 0.1).

    Raises ConfigError for others.
    """
    if not 2 <= len(shares) <= len(PARTS) or any(share <= 0 for share in shares):
        raise ConfigError("shares are two or three numbers above 0: train, val and test, such as 80/10/10")
    return tuple(share / sum(shares) for share in shares)


def split_pairs(
    pairs: Pairs, shares: Sequence[float], alike: Sequence[Sequence[int]] = (), seed: int = 0
) -> tuple[Pairs, ...]:
    """Split by image: all captions of an image, and images that are alike, come into one part.

    Args:
        pairs: what is split.
        shares: of the images, as for `check_shares`.
        alike: groups of numbers of images that stay together.
        seed: of the order in which images are drawn.

    Raises:
        ConfigError: shares that are none.
        DataError: fewer images that differ than parts.
    """
    shares = check_shares(shares)
    groups = joined(len(pairs), alike)
    grouped = {number for group in groups for number in group}
    groups += [(number,) for number in range(len(pairs)) if number not in grouped]
    if len(groups) < len(shares):
        raise DataError(
            f"{len(groups)} images that differ cannot be split into {len(shares)} parts; add images"
        )
    random.Random(seed).shuffle(groups)
    groups.sort(key=len, reverse=True)  # large ones first, so that small ones even out
    chosen: list[list[int]] = [[] for _ in shares]
    for place, group in enumerate(groups):
        left = len(groups) - place
        empty = [part for part, own in enumerate(chosen) if not own]
        wanted = range(len(shares)) if left > len(empty) else empty
        lacks = {part: shares[part] * len(pairs) - len(chosen[part]) for part in wanted}
        chosen[max(lacks, key=lambda part: lacks[part])] += group
    return tuple(
        Pairs(tuple(pairs.images[i] for i in own), tuple(pairs.captions[i] for i in own))
        for own in map(sorted, chosen)
    )


def part_files(folder: Path, count: int, overwrite: bool = False) -> list[Path]:
    """Name the files of so many parts; raises ConfigError as `write_parts` does."""
    paths = [folder / f"{name}.csv" for name in PARTS[:count]]
    there = [str(path) for path in paths if os.path.lexists(path)]
    if there and not overwrite:
        raise ConfigError(f"{', '.join(there)}: there already; name another `out`, or add `overwrite=True`")
    return paths


def write_parts(parts: Sequence[Pairs], folder: Path, overwrite: bool = False) -> list[Path]:
    """Write `train.csv`, `val.csv` and `test.csv` with the columns filepath and title, a line each caption.

    Paths are relative to the folder, so that both can be moved together.

    Raises:
        ConfigError: one of the files is there already, and `overwrite` is not given; none is written then.
    """
    paths = part_files(folder, len(parts), overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    for path, part in zip(paths, parts, strict=True):
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("filepath", "title"))
        writer.writerows((_relative(part.images[image], folder), caption) for image, caption in part.rows())
        write_text(path, text.getvalue())
    return paths


def _relative(image: Path, folder: Path) -> str:
    try:
        return Path(os.path.relpath(image, folder)).as_posix()
    except ValueError:  # on another drive
        return str(image)
