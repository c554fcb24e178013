"""What trains: towers frozen whole, or down to their last groups, as open_clip's lock flags do."""

from __future__ import annotations

from clipgraft.models.clip import Clip
from clipgraft.models.sites import Tower


def lock_tower(clip: Clip, tower: Tower, unlocked_groups: int = 0) -> None:
    """Freeze a tower but for its last `unlocked_groups` groups.

    Groups run from input to output: the embeddings, each block, the last block with the final norm, and the
    projection (Zhai et al. 2022, arXiv:2111.07991, as open_clip counts them).
    """
    groups = clip.family.tower_groups(clip.model, tower)
    trainable = groups[len(groups) - min(unlocked_groups, len(groups)) :]
    for group in groups:
        for parameter in group:
            parameter.requires_grad_(False)
    for group in trainable:
        for parameter in group:
            parameter.requires_grad_(True)
