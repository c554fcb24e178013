"""What trains: towers frozen whole, or down to their last groups, as open_clip's lock flags do."""

from __future__ import annotations

from clipgraft.errors import ConfigError
from clipgraft.models.clip import Clip
from clipgraft.models.sites import Tower

_FLAGS = {"vision": "--lock-image-unlocked-groups", "text": "--lock-text-unlocked-layers"}


def lock_tower(clip: Clip, tower: Tower, unlocked_groups: int = 0) -> None:
    """Freeze a tower but for its last `unlocked_groups` groups.

    Groups run from input to output: the embeddings, each block, the last block with the final norm, and the
    projection (Zhai et al. 2022, arXiv:2111.07991, as open_clip counts them).

    Raises:
        ConfigError: the tower is no transformer, and has no groups to leave unlocked.
    """
    groups = clip.family.tower_groups(clip.model, tower)
    if unlocked_groups and len(groups) == 1:
        raise ConfigError(
            f"{_FLAGS[tower]}: this base's {tower} tower can only be locked whole; drop the flag"
        )
    locked = max(0, len(groups) - unlocked_groups)
    for number, group in enumerate(groups):
        for parameter in group:
            parameter.requires_grad_(number >= locked)
