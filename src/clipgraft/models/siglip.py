"""SigLIP's own parts in transformers: the attention-pooling head, and images as sequences of patches.

`Siglip2Model` takes images of any shape, each as its patches in reading order, padded to one length. Here
they travel as one tensor (N, 1, 1 + patches, dim), which datasets, caches and batches treat like pixels: the
first row holds the height and width of the image in patches, two numbers below 256 each, which are exact in
every floating type.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from clipgraft.errors import DataError
from clipgraft.models.names import site_path
from clipgraft.models.sites import Site, SiteRef

_ATTENTION = "vision_model.head.attention"
_BASE = 256


def has_pooling_head(model: nn.Module) -> bool:
    """Whether the vision tower pools with a query of its own, through `nn.MultiheadAttention`."""
    head = getattr(getattr(model, "vision_model", None), "head", None)
    return isinstance(getattr(head, "attention", None), nn.MultiheadAttention)


def pooling_refs(model: nn.Module) -> list[SiteRef]:
    """The sites of the pooling head."""
    attention: Any = model.get_submodule(_ATTENTION)
    dim = attention.in_proj_weight.shape[1]
    refs = [
        SiteRef(
            Site("vision", None, f"pool_{role}"),
            _ATTENTION,
            "in_proj_weight",
            "fused",
            (dim, dim),
            slice(number * dim, (number + 1) * dim),
        )
        for number, role in enumerate("qkv")
    ]
    out = Site("vision", None, "pool_out")
    refs.append(SiteRef(out, _ATTENTION, "out_proj.weight", "fused", tuple(attention.out_proj.weight.shape)))
    for role in ("fc1", "fc2"):
        path = f"vision_model.head.mlp.{role}"
        shape = tuple(model.get_submodule(path).weight.shape)  # type: ignore[arg-type]
        refs.append(SiteRef(Site("vision", None, f"pool_{role}"), path, "weight", "linear", shape))
    return refs


def pooling_biases(model: nn.Module) -> Iterator[tuple[str, list[tuple[str, Tensor]]]]:
    """The fused bias of the pooling head by its own name, with its shares by canonical name."""
    name = f"{_ATTENTION}.in_proj_bias"
    fused = model.get_parameter(name)
    parts = zip("qkv", fused.detach().chunk(3), strict=True)
    paths = [(site_path(Site("vision", None, f"pool_{role}")), part) for role, part in parts]
    yield name, [(f"{path}.bias", part) for path, part in paths]


def packed_shape(model: nn.Module, patches: int) -> tuple[int, int, int]:
    """The shape of one image of so many patches as `pack_patches` gives it."""
    size = int(model.config.vision_config.patch_size)  # type: ignore[union-attr, arg-type]
    return 1, 1 + patches, 3 * size * size


def pack_patches(patches: Tensor, shape: Tensor) -> Tensor:
    """(patches, dim) of one image and its (height, width) in patches -> (1, 1 + patches, dim)."""
    height, width = (int(number) for number in shape)
    first = patches.new_zeros(1, patches.shape[1])
    first[0, :4] = torch.tensor([*divmod(height, _BASE), *divmod(width, _BASE)], dtype=patches.dtype)
    return torch.cat([first, patches])[None]


def image_features(model: nn.Module, images: Tensor) -> Any:
    """What `Siglip2Model.get_image_features` gives for packed patches, or for (N, 3, H, W) pixels.

    Raises:
        DataError: images of neither form.
    """
    patches, shapes = _unpacked(images) if images.shape[1] == 1 else _cut(model, images)
    number = torch.arange(patches.shape[1], device=patches.device)
    mask = (number < shapes.prod(-1, keepdim=True)).to(torch.int64)
    return model.get_image_features(  # type: ignore[operator]
        pixel_values=patches, pixel_attention_mask=mask, spatial_shapes=shapes
    )


def _unpacked(images: Tensor) -> tuple[Tensor, Tensor]:
    rows = images[:, 0]
    digits = rows[:, 0, :4].round().long()
    return rows[:, 1:], torch.stack(
        [digits[:, 0] * _BASE + digits[:, 1], digits[:, 2] * _BASE + digits[:, 3]], 1
    )


def _cut(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """(N, 3, H, W) pixels as patches in reading order, their values by row, column and channel."""
    size = int(model.config.vision_config.patch_size)  # type: ignore[union-attr, arg-type]
    if images.shape[1] != 3 or images.shape[2] % size or images.shape[3] % size:
        raise DataError(
            f"images of {tuple(images.shape)}: Siglip2Model takes pixels whose sides are multiples of its "
            f"patches of {size}, or what its processor gives"
        )
    count, _, height, width = images.shape
    grid = images.reshape(count, 3, height // size, size, width // size, size)
    patches = grid.permute(0, 2, 4, 3, 5, 1).reshape(count, -1, 3 * size * size)
    shape = torch.tensor([height // size, width // size], device=images.device)
    return patches, shape.expand(count, 2)
