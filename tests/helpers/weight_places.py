"""Name the weights of tiny models by site, and compute W + s·B·A from those names.

A table of places says for each site which entry of the state dict holds its weight, and which of several
equal shares of the rows. The tables are written by hand, a second time, next to the models
(`tiny_towers.WEIGHTS`, `tiny_dual.WEIGHTS`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

Update = tuple[Tensor, Tensor, float]
Place = tuple[str, int, int]
"""Name in the state dict, index of the share of rows, number of shares."""
Places = Mapping[str, Place]
DIM, SIZE, CONTEXT = 24, 32, 16
"""Features, sides of images in pixels, and tokens of the tiny models."""
_TABLES = ("token_embedding", "position_embedding")
_FROM_THE_RIGHT = "visual.proj"  # open_clip's raw Parameter (in, out)


def blocks(tower: str, paths: Sequence[str], places: Mapping[str, str | Place]) -> dict[str, Place]:
    """Sites of blocks at some paths; a place below a path is a module, or a weight with its share of rows."""
    return {
        f"{tower}.{number}.{role}": (f"{path}.{name}", index, count)
        for number, path in enumerate(paths)
        for role, place in places.items()
        for name, index, count in [(f"{place}.weight", 0, 1) if isinstance(place, str) else place]
    }


def named(**sites: str) -> dict[str, Place]:
    """Sites outside blocks, `text__proj="text.proj.weight"`."""
    return {site.replace("__", "."): (name, 0, 1) for site, name in sites.items()}


def explicit_weights(base: nn.Module, places: Places, updates: Mapping[str, Update]) -> dict[str, Tensor]:
    """W + s·B·A for every weight that has an update, differentiable in A and B."""
    state = {name: weight.detach() for name, weight in base.state_dict().items()}
    changed: dict[str, Tensor] = {}
    for site, (a, b, scale) in updates.items():
        name, index, count = places[site]
        weight = changed.get(name, state[name])
        product = scale * b.flatten(1) @ a.flatten(1)
        if site.endswith(_TABLES) or name == _FROM_THE_RIGHT:
            product = product.T
        shares = list(weight.chunk(count))
        shares[index] = shares[index] + product.reshape(shares[index].shape)
        changed[name] = torch.cat(shares)
    return changed


def explicit_model(base: nn.Module, places: Places, updates: Mapping[str, Update]) -> nn.Module:
    """A copy of the base with W + s·B·A in its weights."""
    model = copy.deepcopy(base)
    with torch.no_grad():
        for name, weight in explicit_weights(base, places, updates).items():
            model.get_parameter(name).copy_(weight)
    return model


def pixels(size: int = SIZE) -> Tensor:
    """(3, 3, size, size) pixels."""
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))


def ids(padding: int = 0, seed: int = 0) -> Tensor:
    """(3, 16) token ids; every row ends with 99, and is padded from there, at another position."""
    found = torch.randint(3, 98, (3, CONTEXT), generator=torch.Generator().manual_seed(seed))
    for row in range(3):
        found[row, 6 + 2 * row] = 99
        found[row, 7 + 2 * row :] = padding
    return found
