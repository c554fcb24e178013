"""The towers of a `transformers.CLIPModel` taken apart."""

from __future__ import annotations

from typing import Any

from clipgraft.models.anatomy import Block, Part, TextTower, VisionTower, activation_of, linear_part
from clipgraft.models.sites import Site, Tower


def text_tower(model: Any) -> TextTower | None:
    """The parts of the text tower of a model whose type is `clip`."""
    text = model.text_model
    blocks = _blocks("text", text)
    if blocks is None:
        return None
    proj = linear_part(model.text_projection, Site("text", None, "proj"))
    if proj is None:
        return None
    embeddings = text.embeddings
    return TextTower(
        Part(embeddings.token_embedding.weight, None, None, Site("text", None, "token_embedding")),
        Part(embeddings.position_embedding.weight, None, None, Site("text", None, "position_embedding")),
        *blocks,
        text.final_layer_norm,
        (proj,),
    )


def vision_tower(model: Any) -> VisionTower | None:
    """The parts of the vision tower of a model whose type is `clip`."""
    vision = model.vision_model
    blocks = _blocks("vision", vision)
    proj = linear_part(model.visual_projection, Site("vision", None, "proj"))
    if blocks is None or proj is None:
        return None
    embeddings = vision.embeddings
    conv, table = embeddings.patch_embedding, embeddings.position_embedding.weight
    height, width = conv.kernel_size
    return VisionTower(
        patch=(Part(conv.weight, conv.bias, None, Site("vision", None, "patch_embedding")),),
        patch_size=(height, width),
        class_embedding=embeddings.class_embedding,
        positions=Part(table, None, None, Site("vision", None, "position_embedding")),
        norm_pre=vision.pre_layrnorm,
        blocks=blocks[0],
        heads=blocks[1],
        norm=vision.post_layernorm,
        proj=(proj,),
    )


def _blocks(tower: Tower, owner: Any) -> tuple[tuple[Block, ...], int] | None:
    layers = owner.encoder.layers
    blocks = [_block(tower, index, layer) for index, layer in enumerate(layers)]
    if any(block is None for block in blocks):
        return None
    return tuple(block for block in blocks if block is not None), int(layers[0].self_attn.num_heads)


def _block(tower: Tower, index: int, layer: Any) -> Block | None:
    attention, mlp = layer.self_attn, layer.mlp
    linears = {
        "q": attention.q_proj,
        "k": attention.k_proj,
        "v": attention.v_proj,
        "out": attention.out_proj,
        "fc1": mlp.fc1,
        "fc2": mlp.fc2,
    }
    parts = {role: linear_part(module, Site(tower, index, role)) for role, module in linears.items()}
    plain = {role: (part,) for role, part in parts.items() if part is not None}
    act = activation_of(mlp.activation_fn)
    if len(plain) < len(parts) or act is None or attention.dropout:
        return None
    return Block(
        norm1=layer.layer_norm1,
        qkv=(*plain["q"], *plain["k"], *plain["v"]),
        out=plain["out"],
        norm2=layer.layer_norm2,
        fc1=plain["fc1"],
        act=act,
        fc2=plain["fc2"],
    )
