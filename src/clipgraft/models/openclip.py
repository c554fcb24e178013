"""The open_clip family: `CLIP` and `CustomTextCLIP`, in the layouts of open_clip 3.x and 4.x.

Both keep q, k and v in one fused `in_proj_weight`. 3.x uses `nn.MultiheadAttention`, whose `out_proj` is
read but never called; 4.x has its own `Attention`. They are told apart by attribute, not by class.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from clipgraft.models.architecture import Block, Part, TextTower, VisionTower, activation_of, linear_part
from clipgraft.models.family import (
    LARGEST_ID,
    base_parameter,
    parameters_of,
    pooled_positions,
    pure_norms,
)
from clipgraft.models.hf import set_hf_checkpointing
from clipgraft.models.hf_text import (
    check_pooler,
    hf_context_length,
    hf_features_on_meta,
    hf_text_ends,
    hf_text_groups,
    hf_text_refs,
    is_hf_text,
)
from clipgraft.models.names import CLIP, SIGLIP, Twin, own_twin, site_path
from clipgraft.models.openclip_names import canonical_weights, norm_path
from clipgraft.models.resnet_tower import resnet_refs
from clipgraft.models.sites import Site, SiteRef, Tower, block_number
from clipgraft.models.timm_tower import is_siglip_tower, timm_refs
from clipgraft.models.timm_vit import timm_parts

_BLOCK_ROLES = {"attn.out_proj": "out", "mlp.c_fc": "fc1", "mlp.c_proj": "fc2"}
_TEXT_ROLES = {
    "token_embedding": "token_embedding",
    "positional_embedding": "position_embedding",
    "text_projection": "proj",
}
_VISION_ROLES = {"conv1": "patch_embedding", "positional_embedding": "position_embedding", "proj": "proj"}


def split_path(path: str) -> tuple[Tower, int | None, str]:
    """`visual.transformer.resblocks.3.mlp.c_fc` -> ("vision", 3, "mlp.c_fc"); the block of others is None."""
    tower: Tower = "vision" if path.startswith("visual.") else "text"
    inner = path.removeprefix("visual." if tower == "vision" else "text.")
    number, _, rest = inner.removeprefix("transformer.resblocks.").partition(".")
    block = block_number(number) if inner.startswith("transformer.resblocks.") else None
    return (tower, None, inner) if block is None else (tower, block, rest)


def path_site(path: str) -> Site | None:
    """The site at a module path or raw Parameter of `CLIP` or `CustomTextCLIP`; None if it is not just one.

    `attn` is three sites, q, k and v, and so has none of its own.
    """
    tower, block, inner = split_path(path)
    roles = _BLOCK_ROLES if block is not None else _TEXT_ROLES if tower == "text" else _VISION_ROLES
    return Site(tower, block, roles[inner]) if inner in roles else None


class OpenClipFamily:
    """Module paths and shortcuts of open_clip models."""

    name = "open_clip"

    def accepts(self, model: nn.Module) -> bool:
        return hasattr(model, "visual") and hasattr(model, "encode_text") and hasattr(model, "logit_scale")

    def site_refs(self, model: nn.Module) -> dict[Site, SiteRef]:
        refs = [*_text_refs(model), *_vision_refs(model)]
        return {ref.site: ref for ref in sorted(refs, key=lambda ref: ref.site.order)}

    def encode_image(self, model: nn.Module, images: Tensor) -> Tensor:
        features: Tensor = model.encode_image(images)  # type: ignore[operator]
        return features

    def encode_text(self, model: nn.Module, tokens: Tensor) -> Tensor:
        if is_hf_text(_text_tower(model)):
            check_pooler(_text_tower(model))
            if tokens.is_meta:
                return hf_features_on_meta(_text_tower(model), tokens)
            whole: Tensor = model.encode_text(tokens)  # type: ignore[operator]
            return whole
        short = tokens.shape[1] < self.context_length(model)
        if short and (not _is_split(model) or _is_causal(_text_tower(model))):
            return _encode_short_text(_text_tower(model), tokens)
        features: Tensor = model.encode_text(tokens)  # type: ignore[operator]
        return features

    def text_ends(self, model: nn.Module, tokens: Tensor) -> Tensor | None:
        if is_hf_text(_text_tower(model)):
            return hf_text_ends(_text_tower(model), tokens)
        pooled = self.pooled_id(model)
        if pooled is None or not _is_causal(_text_tower(model)):
            return None
        return pooled_positions(tokens, pooled)

    def pooled_id(self, model: nn.Module) -> int | None:
        pool, eos = _pooling(_text_tower(model))
        return {"argmax": LARGEST_ID, "eos": eos}.get(pool or "")

    def text_tower(self, model: nn.Module) -> TextTower | None:
        text = _text_tower(model)
        return _text_parts(text) if _is_causal(text) or _sees_all(text) else None

    def vision_tower(self, model: nn.Module) -> VisionTower | None:
        return _vision_parts(_module(model.visual)) or timm_parts(model.visual)

    def image_size(self, model: nn.Module) -> tuple[int, int]:
        size = model.visual.image_size  # type: ignore[union-attr]
        height, width = (size, size) if isinstance(size, int) else size  # type: ignore[misc]
        return int(height), int(width)

    def context_length(self, model: nn.Module) -> int:
        if is_hf_text(_text_tower(model)):
            return hf_context_length(_text_tower(model))
        return int(getattr(model, "context_length", None) or _text_tower(model).context_length)  # type: ignore[arg-type]

    def tower_groups(self, model: nn.Module, tower: Tower) -> list[list[nn.Parameter]]:
        if tower == "text":
            owner = _text_tower(model)
            if is_hf_text(owner):
                return hf_text_groups(owner)
            first = [
                getattr(owner, name, None) for name in ("token_embedding", "positional_embedding", "cls_emb")
            ]
            norm, projection = getattr(owner, "ln_final", None), getattr(owner, "text_projection", None)
        else:
            owner = _module(model.visual)
            names = ("conv1", "class_embedding", "positional_embedding", "ln_pre")
            first = [getattr(owner, name, None) for name in names]
            norm, projection = getattr(owner, "ln_post", None), getattr(owner, "proj", None)
        blocks = _blocks(owner)
        if not blocks:
            return [list(owner.parameters())]
        middle: list[list[object]] = [[block] for block in blocks[:-1]]
        groups = [first, *middle, [blocks[-1], norm], [projection]]
        return [parameters for group in groups if (parameters := parameters_of(group))]

    def set_grad_checkpointing(self, model: nn.Module, enable: bool) -> None:
        text = _text_tower(model)
        if is_hf_text(text):
            # open_clip's own switch turns it on whatever it is told.
            model.visual.set_grad_checkpointing(enable)  # type: ignore[union-attr, operator]
            set_hf_checkpointing(text.transformer, enable)
            return
        model.set_grad_checkpointing(enable)  # type: ignore[operator]

    def twin(self, model: nn.Module) -> Twin:
        if is_hf_text(_text_tower(model)):
            return _twin_with_hf_text(model, self.site_refs(model))
        return SIGLIP if _is_siglip(model) else CLIP

    def norms(self, model: nn.Module) -> dict[str, nn.LayerNorm]:
        twin = self.twin(model)
        return {norm_path(name, twin): module for name, module in pure_norms(model).items()}

    def canonical_weights(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        yield from canonical_weights(model, self.site_refs(model), self.twin(model))


def _is_split(model: nn.Module) -> bool:
    """CustomTextCLIP keeps its text tower in `.text`; CLIP keeps the parts on the model itself."""
    return isinstance(getattr(model, "text", None), nn.Module)


def _twin_with_hf_text(model: nn.Module, refs: dict[Site, SiteRef]) -> Twin:
    """A model that no class of transformers holds: PEFT adapts the text tower of the model itself.

    The vision tower keeps the names that it has in adapter files from before the text tower had sites.
    """
    twin = own_twin(model, refs)
    vision = [site for site in refs if site.tower == "vision"]
    paths = {**twin.paths, **{site: site_path(site, CLIP) for site in vision}}
    return replace(twin, paths=paths, foreign=twin.foreign | set(vision))


def _is_siglip(model: nn.Module) -> bool:
    """Whether `transformers.SiglipModel` holds the same weights: both towers are built as SigLIP's are."""
    if not _is_split(model) or not is_siglip_tower(_module(model.visual)):
        return False
    text = _text_tower(model)
    pooled_last = _pooling(text)[0] == "last" and getattr(text, "attn_mask", None) is None
    return pooled_last and bool(_blocks(text)) and isinstance(text.text_projection, nn.Linear)


def _text_tower(model: nn.Module) -> nn.Module:
    return _module(model.text) if _is_split(model) else model


def _module(value: object) -> nn.Module:
    assert isinstance(value, nn.Module)
    return value


def _blocks(owner: nn.Module) -> list[nn.Module]:
    blocks = getattr(getattr(owner, "transformer", None), "resblocks", None)
    return list(blocks) if isinstance(blocks, nn.ModuleList) else []


def _is_causal(text: nn.Module) -> bool:
    """Whether no token sees a later one; CoCa's class token, at the end, sees all."""
    return getattr(text, "attn_mask", None) is not None and getattr(text, "cls_emb", None) is None


def _sees_all(text: nn.Module) -> bool:
    """Whether all tokens see each other, padding included, and the last one is pooled, as in SigLIP."""
    masked = getattr(text, "attn_mask", None) is not None or getattr(text, "use_pad_mask", False)
    return not masked and getattr(text, "cls_emb", None) is None and _pooling(text)[0] == "last"


def _pooling(text: nn.Module) -> tuple[str | None, int]:
    """How a text tower picks its token, and the end-of-text id; CLIP prefixes the names of both."""
    names = ("text_pool_type", "text_eos_id") if hasattr(text, "text_pool_type") else ("pool_type", "eos_id")
    pool, eos = (getattr(text, name, None) for name in names)
    return pool, -1 if eos is None else int(eos)


def _encode_short_text(text: nn.Module, tokens: Tensor) -> Tensor:
    """The text tower on fewer tokens than its context, with position table and causal mask sliced.

    open_clip slices neither in `CLIP`, and until 4.0 not the mask in `CustomTextCLIP`.
    """
    from open_clip.transformer import text_global_pool

    length = tokens.shape[1]
    transformer = _module(text.transformer)
    dtype = transformer.get_cast_dtype()  # type: ignore[operator]
    x = text.token_embedding(tokens).to(dtype)  # type: ignore[operator]
    x = x + text.positional_embedding[:length].to(dtype)  # type: ignore[index]
    mask = text.attn_mask
    x = transformer(x, attn_mask=None if mask is None else mask[:length, :length])  # type: ignore[index]
    x = text.ln_final(x)  # type: ignore[operator]
    pool, eos = _pooling(text)
    pooled: Tensor = text_global_pool(x, tokens, pool, eos_token_id=eos)
    projection = text.text_projection
    if projection is None:
        return pooled
    return projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection  # type: ignore[operator]


def _text_refs(model: nn.Module) -> Iterator[SiteRef]:
    owner, prefix = _text_tower(model), "text." if _is_split(model) else ""
    if is_hf_text(owner):
        yield from hf_text_refs(owner, "text")
        return
    blocks = _blocks(owner)
    if not blocks:
        return
    embedding = _module(owner.token_embedding)
    shape = tuple(embedding.weight.shape)  # type: ignore[arg-type]
    yield SiteRef(
        Site("text", None, "token_embedding"), f"{prefix}token_embedding", "weight", "embedding", shape
    )
    yield _table_ref("text", owner, prefix.rstrip("."))
    for index, block in enumerate(blocks):
        yield from _block_refs("text", index, block, f"{prefix}transformer.resblocks.{index}")
    yield from _projection_ref("text", owner, prefix.rstrip("."), "text_projection")


def _vision_refs(model: nn.Module) -> Iterator[SiteRef]:
    visual = _module(model.visual)
    if hasattr(visual, "trunk"):
        yield from timm_refs(visual)
        return
    blocks = _blocks(visual)
    if not blocks or not hasattr(visual, "conv1"):
        yield from resnet_refs(visual)
        return
    conv = tuple(visual.conv1.weight.shape)  # type: ignore[union-attr, arg-type]
    yield SiteRef(Site("vision", None, "patch_embedding"), "visual.conv1", "weight", "conv", conv)
    yield _table_ref("vision", visual, "visual")
    for index, block in enumerate(blocks):
        yield from _block_refs("vision", index, block, f"visual.transformer.resblocks.{index}")
    pool = getattr(getattr(visual, "attn_pool", None), "attn", None)
    if isinstance(pool, nn.MultiheadAttention):
        yield from _pooling_refs(pool, "visual.attn_pool.attn")
    yield from _projection_ref("vision", visual, "visual", "proj")


def _pooling_refs(attention: nn.MultiheadAttention, module: str) -> Iterator[SiteRef]:
    """The sites of an attentional pooler (CoCa), whose keys may be wider than its queries."""
    dim = attention.embed_dim
    for number, role in enumerate("qkv"):
        site = Site("vision", None, f"pool_{role}")
        if attention.in_proj_weight is not None:
            rows = slice(number * dim, (number + 1) * dim)
            yield SiteRef(site, module, "in_proj_weight", "fused", (dim, dim), rows)
        else:
            name = f"{role}_proj_weight"
            yield SiteRef(site, module, name, "fused", tuple(base_parameter(attention, name).shape))
    out = tuple(attention.out_proj.weight.shape)
    yield SiteRef(Site("vision", None, "pool_out"), module, "out_proj.weight", "fused", out)


def _table_ref(tower: Tower, owner: nn.Module, module: str) -> SiteRef:
    shape = tuple(base_parameter(owner, "positional_embedding").shape)
    return SiteRef(Site(tower, None, "position_embedding"), module, "positional_embedding", "table", shape)


def _projection_ref(tower: Tower, owner: nn.Module, module: str, name: str) -> Iterator[SiteRef]:
    projection = getattr(owner, name, None)
    site = Site(tower, None, "proj")
    if isinstance(projection, nn.Linear):
        path = f"{module}.{name}" if module else name
        yield SiteRef(site, path, "weight", "linear", tuple(projection.weight.shape))
    elif projection is not None:
        inner, out = base_parameter(owner, name).shape
        yield SiteRef(site, module, name, "projection", (out, inner))


def _block_refs(tower: Tower, index: int, block: nn.Module, path: str) -> Iterator[SiteRef]:
    attention = _module(block.attn)
    weight = getattr(attention, "in_proj_weight", None)
    if isinstance(weight, Tensor):
        dim = weight.shape[1]
        for position, role in enumerate("qkv"):
            rows = slice(position * dim, (position + 1) * dim)
            site = Site(tower, index, role)
            yield SiteRef(site, f"{path}.attn", "in_proj_weight", "fused", (dim, dim), rows)
        out = tuple(attention.out_proj.weight.shape)  # type: ignore[union-attr, arg-type]
        yield SiteRef(Site(tower, index, "out"), f"{path}.attn", "out_proj.weight", "fused", out)
    for role, name in (("fc1", "c_fc"), ("fc2", "c_proj")):
        linear = getattr(block.mlp, name, None)
        if isinstance(linear, nn.Linear):
            site = Site(tower, index, role)
            yield SiteRef(site, f"{path}.mlp.{name}", "weight", "linear", tuple(linear.weight.shape))


def _text_parts(text: Any) -> TextTower | None:
    """The parts of a `CLIP` or `TextTransformer` that is causal, or sees all (`_sees_all`)."""
    blocks = _all_block_parts("text", text)
    if blocks is None or not isinstance(getattr(text, "ln_final", None), nn.LayerNorm):
        return None
    return TextTower(
        Part(text.token_embedding.weight, None, None, Site("text", None, "token_embedding")),
        _table(text, Site("text", None, "position_embedding")),
        *blocks,
        text.ln_final,
        _projection(text, "text_projection", Site("text", None, "proj")),
        _is_causal(text),
    )


def _vision_parts(visual: Any) -> VisionTower | None:
    """The parts of a `VisionTransformer` that pools its class token."""
    blocks = _all_block_parts("vision", visual)
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


def _all_block_parts(tower: Tower, owner: Any) -> tuple[tuple[Block, ...], int] | None:
    """All blocks and their number of heads; None if one of them is not plain."""
    modules = getattr(getattr(owner, "transformer", None), "resblocks", None)
    if not isinstance(modules, nn.ModuleList) or not len(modules):
        return None
    blocks = [_block_parts(tower, index, module) for index, module in enumerate(modules)]
    if any(block is None for block in blocks):
        return None
    first: Any = modules[0]
    return tuple(block for block in blocks if block is not None), int(first.attn.num_heads)


def _block_parts(tower: Tower, index: int, block: Any) -> Block | None:
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
