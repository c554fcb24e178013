"""Which blocks of a tower stay."""

from __future__ import annotations

from collections.abc import Sequence

from clipgraft.errors import ConfigError
from clipgraft.models.sites import Tower


def choose_blocks(
    tower: Tower, depth: int, layers: int | None = None, blocks: Sequence[int] | None = None
) -> tuple[int, ...]:
    """The blocks of a tower of `depth` that stay: `layers` spread evenly, or `blocks` as given; else all.

    Spread evenly, the first and the last are among them: 3 of 12 are 0, 5 and 11.

    Raises:
        ConfigError: both are given, or what is given is not in the tower or not in order.
    """
    if layers is not None and blocks is not None:
        raise ConfigError(f"--{tower}-layers and --{tower}-blocks both choose blocks: give one of them")
    if blocks is not None:
        return _checked(tower, depth, tuple(blocks))
    if layers is None:
        return tuple(range(depth))
    if not 1 <= layers <= depth:
        raise ConfigError(f"--{tower}-layers {layers}: the {tower} tower has {depth}; keep 1 to {depth}")
    return tuple(place * (depth - 1) // max(layers - 1, 1) for place in range(layers))


def _checked(tower: Tower, depth: int, blocks: tuple[int, ...]) -> tuple[int, ...]:
    shown = ",".join(map(str, blocks))
    outside = [block for block in blocks if not 0 <= block < depth]
    if outside or not blocks:
        what = f"there is no block {outside[0]}" if outside else "no block is left"
        raise ConfigError(f"--{tower}-blocks {shown}: {what}; name some of 0 to {depth - 1}")
    if list(blocks) != sorted(set(blocks)):
        raise ConfigError(f"--{tower}-blocks {shown}: name each block once, in rising order")
    return blocks
