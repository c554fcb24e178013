"""Plain open_clip towers taken apart, in the layouts of 3.x and 4.x."""

from __future__ import annotations

from typing import Any

from torch import nn

from clipgraft.models.anatomy import Block, Part, TextTower, VisionTower, activation_of, linear_part
from clipgraft.models.family import base_parameter
from clipgraft.models.sites import Site, Tower


def text_tower(text: Any) -> TextTower | None:
    """The parts of a `CLIP` or `TextTransformer`, whose mask is known to be causal."""
    blocks = _blocks("text", text)
    if blocks is None or not isinstance(getattr(text, "ln_final", None), nn.LayerNorm):
        return None
    return TextTower(
        Part(text.token_embedding.weight, None, None, Site("text", None, "token_embedding")),
        _table(text, Site("text", None, "position_embedding")),
        *blocks,
        text.ln_final,
        _projection(text, "text_projection", Site("text", None, "proj")),
    )


def vision_tower(visual: Any) -> VisionTower | None:
    """The parts of a `VisionTransformer` that pools its class token."""
    blocks = _blocks("vision", visual)
    if blocks is None or not _is_plain_vit(visual):
        return None
    conv = visual.conv1
    height, width = conv.kernel_size
    return VisionTower(
        patch=(Part(conv.weight, conv.bias, None, Site("vision", None, "patch_embedding")),),
        patch_size=(height, width),
        class_embedding=visual.class_embedding,
        positions=_table(visual, Site("vision", None, "position_embedding")),
        norm_pre=visual.ln_pre,
        blocks=blocks[0],
        heads=blocks[1],
        norm=visual.ln_post,
        proj=_projection(visual, "proj", Site("vision", None, "proj")),
    )


def _table(owner: Any, site: Site) -> Part:
    return Part(base_parameter(owner, "positional_embedding"), None, None, site)


def _projection(owner: Any, name: str, site: Site) -> tuple[Part, ...] | None:
    """A raw (in, out) Parameter, which multiplies from the right, or a Linear."""
    projection = getattr(owner, name)
    if projection is None:
        return None
    if isinstance(projection, nn.Linear):
        return (Part(projection.weight, projection.bias, None, site),)
    return (Part(base_parameter(owner, name), None, None, site, transposed=True),)


def _is_plain_vit(visual: Any) -> bool:
    conv = getattr(visual, "conv1", None)
    return (
        type(conv) is nn.Conv2d
        and conv.stride == conv.kernel_size
        and conv.padding == (0, 0)
        and getattr(visual, "pool_type", None) == "tok"
        and getattr(visual, "attn_pool", None) is None
        and isinstance(getattr(visual, "patch_dropout", None), nn.Identity)
        and isinstance(getattr(visual, "ln_pre", None), nn.LayerNorm)
        and isinstance(getattr(visual, "ln_post", None), nn.LayerNorm)
    )


def _blocks(tower: Tower, owner: Any) -> tuple[tuple[Block, ...], int] | None:
    """All blocks and their number of heads; None if one of them is not plain."""
    modules = getattr(getattr(owner, "transformer", None), "resblocks", None)
    if not isinstance(modules, nn.ModuleList) or not len(modules):
        return None
    blocks = [_block(tower, index, module) for index, module in enumerate(modules)]
    if any(block is None for block in blocks):
        return None
    first: Any = modules[0]
    return tuple(block for block in blocks if block is not None), int(first.attn.num_heads)


def _block(tower: Tower, index: int, block: Any) -> Block | None:
    if not _is_plain_block(block) or not _is_plain_attention(block.attn):
        return None
    attention, mlp = block.attn, block.mlp
    act = activation_of(getattr(mlp, "gelu", None))
    fc1 = linear_part(mlp.c_fc, Site(tower, index, "fc1"))
    fc2 = linear_part(mlp.c_proj, Site(tower, index, "fc2"))
    if act is None or fc1 is None or fc2 is None or len(mlp) != 3:
        return None
    dim = attention.in_proj_weight.shape[1]
    qkv = tuple(
        Part(
            attention.in_proj_weight,
            attention.in_proj_bias,
            slice(number * dim, (number + 1) * dim),
            Site(tower, index, role),
        )
        for number, role in enumerate("qkv")
    )
    out = attention.out_proj
    out_part = Part(out.weight, out.bias, None, Site(tower, index, "out"))
    return Block(block.ln_1, qkv, (out_part,), block.ln_2, (fc1,), act, (fc2,))


def _is_plain_block(block: Any) -> bool:
    """No norms between its parts (`CustomResidualAttentionBlock`), cross-attention or layer scale."""
    extras = ("ln_attn", "ln_1_kv")
    scales = (getattr(block, "ls_1", None), getattr(block, "ls_2", None))
    return (
        not any(hasattr(block, name) for name in extras)
        and all(isinstance(scale, nn.Identity) for scale in scales)
        and isinstance(getattr(block, "mlp", None), nn.Sequential)
        and hasattr(block, "attn")
    )


def _is_plain_attention(attention: Any) -> bool:
    if isinstance(attention, nn.MultiheadAttention):
        plain = attention.bias_k is None and not attention.add_zero_attn and attention.dropout == 0
        return plain and attention.in_proj_weight is not None
    if not isinstance(attention, nn.Module) or getattr(attention, "in_proj_weight", None) is None:
        return False
    identities = all(
        isinstance(getattr(attention, name, None), nn.Identity) for name in ("ln_q", "ln_k", "ln_inner")
    )
    scales = (getattr(attention, "logit_scale", None), getattr(attention, "head_scale", None))
    drops = (getattr(attention, "attn_drop", None), getattr(attention, "out_drop", None))
    return (
        identities
        and all(scale is None for scale in scales)
        and all(isinstance(drop, nn.Dropout) and drop.p == 0 for drop in drops)
    )
