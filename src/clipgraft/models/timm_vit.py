"""The parts of timm's `VisionTransformer`, where it is the plain one that SigLIP has.

Its modules have many options, and other classes of timm the same attributes with another forward. So a tower
is plain only if each module is of the very class whose forward is known, and every option is off.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from clipgraft.models.architecture import (
    AttentionPool,
    Block,
    Part,
    VisionTower,
    activation_of,
    linear_part,
)
from clipgraft.models.family import base_parameter
from clipgraft.models.sites import Site


def timm_parts(visual: Any) -> VisionTower | None:
    """The parts of a `TimmModel` without a class token that pools by attention; None for any other."""
    trunk: Any = getattr(visual, "trunk", None)
    if not _is(trunk, "VisionTransformer") or not _is_plain_trunk(trunk) or _has_weights(visual.head):
        return None
    blocks = [_block(number, block) for number, block in enumerate(trunk.blocks)]
    pool, conv = _pool(trunk.attn_pool), trunk.patch_embed.proj
    if not blocks or any(block is None for block in blocks) or pool is None:
        return None
    height, width = conv.kernel_size
    return VisionTower(
        patch=(Part(conv.weight, conv.bias, None, Site("vision", None, "patch_embedding")),),
        patch_size=(height, width),
        class_embedding=None,
        positions=Part(
            base_parameter(trunk, "pos_embed"), None, None, Site("vision", None, "position_embedding")
        ),
        norm_pre=None,
        blocks=tuple(block for block in blocks if block is not None),
        heads=int(trunk.blocks[0].attn.num_heads),
        norm=trunk.norm,
        proj=None,
        pool=pool,
    )


def _is(module: object, name: str) -> bool:
    """Whether a module is of a class of timm itself, not of one derived from it."""
    # torch gives a parametrised module a class of its own, below the one it had.
    kind = type(module).__mro__[1] if hasattr(module, "parametrizations") else type(module)
    return kind.__name__ == name and kind.__module__.startswith("timm.")


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _are_off(owner: Any, *names: str) -> bool:
    """Whether parts of a module do nothing: absent, an Identity, or dropout of 0."""
    parts = [getattr(owner, name, None) for name in names]
    return all(
        part is None or type(part) is nn.Identity or (isinstance(part, nn.Dropout) and part.p == 0)
        for part in parts
    )


def _is_plain_trunk(trunk: Any) -> bool:
    conv = getattr(trunk.patch_embed, "proj", None)
    return (
        _is(trunk.patch_embed, "PatchEmbed")
        and type(conv) is nn.Conv2d
        and conv.stride == conv.kernel_size
        and conv.padding == (0, 0)
        and not trunk.patch_embed.dynamic_img_pad
        and trunk.pos_embed is not None
        and trunk.num_prefix_tokens == 0
        and isinstance(trunk.norm, nn.LayerNorm)
        and not _has_weights(trunk.head)
        and _are_off(trunk.patch_embed, "norm")
        and _are_off(trunk, "pos_drop", "patch_drop", "norm_pre", "fc_norm", "head_drop", "head")
    )


def _block(number: int, block: Any) -> Block | None:
    attention, mlp = block.attn, block.mlp
    plain = (
        _is(block, "Block")
        and _is(attention, "Attention")
        and _is(mlp, "Mlp")
        and attention.attn_dim == attention.qkv.in_features
        and _are_off(block, "ls1", "drop_path1", "ls2", "drop_path2")
        and _are_off(attention, "q_norm", "k_norm", "norm", "gate", "attn_drop", "proj_drop")
        and _are_off(mlp, "drop1", "norm", "drop2")
    )
    sites = {role: Site("vision", number, role) for role in ("q", "k", "v", "out", "fc1", "fc2")}
    fused = linear_part(attention.qkv, sites["q"]) if plain else None
    act = activation_of(mlp.act) if plain else None
    if fused is None or act is None:
        return None
    size = attention.attn_dim
    qkv = tuple(
        Part(fused.weight, fused.bias, slice(place * size, (place + 1) * size), sites[role])
        for place, role in enumerate("qkv")
    )
    out, fc1, fc2 = (
        linear_part(module, sites[role])
        for module, role in ((attention.proj, "out"), (mlp.fc1, "fc1"), (mlp.fc2, "fc2"))
    )
    if out is None or fc1 is None or fc2 is None:
        return None
    return Block(block.norm1, qkv, (out,), block.norm2, (fc1,), act, (fc2,))


def _pool(pool: Any) -> AttentionPool | None:
    plain = (
        _is(pool, "AttentionPoolLatent")
        and pool.latent_len == 1
        and pool.pos_embed is None
        and pool.pool in ("token", "avg")
        and pool.mlp is not None
        and _is(pool.mlp, "Mlp")
        and _are_off(pool, "q_norm", "k_norm", "proj_drop")
        and _are_off(pool.mlp, "drop1", "norm", "drop2")
    )
    if not plain:
        return None
    act, names = activation_of(pool.mlp.act), ("q", "k", "v", "out", "fc1", "fc2")
    sites = {role: Site("vision", None, f"pool_{role}") for role in names}
    modules = {"q": pool.q, "k": pool.kv, "out": pool.proj, "fc1": pool.mlp.fc1, "fc2": pool.mlp.fc2}
    parts = {role: linear_part(module, sites[role]) for role, module in modules.items()}
    q, fused, out, fc1, fc2 = parts.values()
    if q is None or fused is None or out is None or fc1 is None or fc2 is None or act is None:
        return None
    size = pool.kv.out_features // 2
    kv = tuple(
        Part(fused.weight, fused.bias, slice(place * size, (place + 1) * size), sites[role])
        for place, role in enumerate("kv")
    )
    return AttentionPool(pool.latent, (q,), kv, (out,), pool.norm, (fc1,), act, (fc2,), int(pool.num_heads))
