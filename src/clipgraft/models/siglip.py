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
from clipgraft.models.architecture import AttentionPool, Part, activation_of, linear_part
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


def pooling_parts(head: Any) -> AttentionPool | None:
    """The parts of the pooling head; None where its forward differs in anything."""
    attention, act = head.attention, activation_of(head.mlp.activation_fn)
    plain = attention.bias_k is None and not attention.add_zero_attn and attention.dropout == 0
    fc1 = linear_part(head.mlp.fc1, Site("vision", None, "pool_fc1"))
    fc2 = linear_part(head.mlp.fc2, Site("vision", None, "pool_fc2"))
    if not plain or attention.in_proj_weight is None or act is None or fc1 is None or fc2 is None:
        return None
    weight, bias, out = attention.in_proj_weight, attention.in_proj_bias, attention.out_proj
    dim = weight.shape[1]
    q, k, v = (
        Part(weight, bias, slice(n * dim, (n + 1) * dim), Site("vision", None, f"pool_{role}"))
        for n, role in enumerate("qkv")
    )
    return AttentionPool(
        probe=head.probe,
        q=(q,),
        kv=(k, v),
        out=(Part(out.weight, out.bias, None, Site("vision", None, "pool_out")),),
        norm=head.layernorm,
        fc1=(fc1,),
        act=act,
        fc2=(fc2,),
        heads=int(attention.num_heads),
    )


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
    patches, shapes = unpack_patches(images) if images.shape[1] == 1 else _cut(model, images)
    return patch_features(model, patches, shapes)


def patch_features(model: nn.Module, patches: Tensor, shapes: Tensor) -> Any:
    """The same for (N, patches, dim) patches and the (N, 2) heights and widths of their images in patches."""
    number = torch.arange(patches.shape[1], device=shapes.device)
    mask = (number < shapes.prod(-1, keepdim=True)).to(torch.int64)
    # transformers asks a mask whether it hides anything, and on the meta device no number is there.
    return model.get_image_features(  # type: ignore[operator]
        pixel_values=patches,
        pixel_attention_mask=None if patches.is_meta else mask,
        spatial_shapes=shapes,
    )


def unpack_patches(images: Tensor) -> tuple[Tensor, Tensor]:
    """(N, 1, 1 + patches, dim) -> (N, patches, dim), and (N, 2) heights and widths in patches."""
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
    # transformers asks for the numbers, which are known of pixels without any too.
    device = "cpu" if images.is_meta else images.device
    shape = torch.tensor([height // size, width // size], device=device)
    return patches, shape.expand(count, 2)
