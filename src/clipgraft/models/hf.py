"""The transformers family: `CLIPModel`, `SiglipModel` and `Siglip2Model`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from clipgraft.models.architecture import Block, Part, TextTower, VisionTower, activation_of, linear_part
from clipgraft.models.family import (
    LARGEST_ID,
    base_parameter,
    is_lora,
    parameters_of,
    pooled_positions,
    pure_norms,
    site_weight,
)
from clipgraft.models.names import CLIP, EMBEDDINGS, SIGLIP, SIGLIP2, TOWER_MODULE, Twin, site_path
from clipgraft.models.siglip import (
    has_pooling_head,
    image_features,
    pooling_biases,
    pooling_parts,
    pooling_refs,
)
from clipgraft.models.sites import BLOCK_ROLES, Site, SiteKind, SiteRef, Tower

_PROJECTION: dict[Tower, str] = {"text": "text_projection", "vision": "visual_projection"}
# Siglip2Model resizes its positions to the grid of every image.
_PLAIN_TEXT, _PLAIN_VISION = ("clip", "siglip", "siglip2"), ("clip", "siglip")
LARGEST_ID_AS_EOS = 2
"""transformers keeps CLIP's original rule, the largest id, for configurations whose eos_token_id is 2."""


def set_hf_checkpointing(model: nn.Module, enable: bool) -> None:
    """`Family.set_grad_checkpointing` of any model of transformers."""
    # transformers 5 renames the switch along the way, and removes the old name in 6.
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if enable:
        getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(model, f"{kind}_checkpointing_disable")()


class HfFamily:
    """Module paths and shortcuts of `transformers.CLIPModel` and its relatives."""

    name = "transformers"
    set_grad_checkpointing = staticmethod(set_hf_checkpointing)
    norms = staticmethod(pure_norms)

    def accepts(self, model: nn.Module) -> bool:
        named = all(hasattr(model, name) for name in ("get_text_features", "config", "logit_scale"))
        return named and all(_layers(model, tower) is not None for tower in TOWER_MODULE)

    def site_refs(self, model: nn.Module) -> dict[Site, SiteRef]:
        twin = self.twin(model)
        refs = [_ref(model, site, twin) for site in _sites(model, twin)]
        if has_pooling_head(model):
            refs += pooling_refs(model)
        return {ref.site: ref for ref in sorted(refs, key=lambda ref: ref.site.order)}

    def encode_image(self, model: nn.Module, images: Tensor) -> Tensor:
        if self.twin(model) is SIGLIP2:
            return _features(image_features(model, images))
        return _features(model.get_image_features(pixel_values=images))  # type: ignore[operator]

    def encode_text(self, model: nn.Module, tokens: Tensor) -> Tensor:
        return _features(model.get_text_features(input_ids=tokens))  # type: ignore[operator]

    def text_ends(self, model: nn.Module, tokens: Tensor) -> Tensor | None:
        pooled = self.pooled_id(model)
        return None if pooled is None else pooled_positions(tokens, pooled)

    def pooled_id(self, model: nn.Module) -> int | None:
        if _type(model) != "clip":
            return None
        eos = int(model.text_model.eos_token_id)  # type: ignore[union-attr, arg-type]
        return LARGEST_ID if eos == LARGEST_ID_AS_EOS else eos

    def text_tower(self, model: nn.Module) -> TextTower | None:
        return _text_parts(model) if _type(model) in _PLAIN_TEXT else None

    def vision_tower(self, model: nn.Module) -> VisionTower | None:
        return _vision_parts(model) if _type(model) in _PLAIN_VISION else None

    def image_size(self, model: nn.Module) -> tuple[int, int]:
        config = model.config.vision_config  # type: ignore[union-attr]
        if self.twin(model) is SIGLIP2:
            side = math.isqrt(int(config.num_patches)) * int(config.patch_size)  # type: ignore[union-attr, arg-type]
            return side, side
        size = config.image_size  # type: ignore[union-attr]
        height, width = (size, size) if isinstance(size, int) else size  # type: ignore[misc]
        return int(height), int(width)

    def context_length(self, model: nn.Module) -> int:
        return int(model.config.text_config.max_position_embeddings)  # type: ignore[union-attr, arg-type]

    def tower_groups(self, model: nn.Module, tower: Tower) -> list[list[nn.Parameter]]:
        owner = model.get_submodule(TOWER_MODULE[tower])
        norms = ("final_layer_norm",) if tower == "text" else ("post_layernorm",)
        first = [getattr(owner, "embeddings", None), getattr(owner, "pre_layrnorm", None)]
        blocks = list(owner.encoder.layers)  # type: ignore[union-attr, arg-type]
        last = [blocks[-1], *(getattr(owner, name, None) for name in norms)]
        # SigLIP projects its texts, and pools its images, inside the tower.
        projection = [getattr(model, _PROJECTION[tower], None), getattr(owner, "head", None)]
        groups = [first, *([block] for block in blocks[:-1]), last, projection]
        return [parameters for group in groups if (parameters := parameters_of(group))]

    def twin(self, model: nn.Module) -> Twin:
        return {"siglip": SIGLIP, "siglip2": SIGLIP2}.get(_type(model), CLIP)

    def canonical_weights(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        refs, twin = self.site_refs(model), self.twin(model)
        taken = {f"{ref.module}.{ref.parameter}" for ref in refs.values()}
        for site, ref in refs.items():
            yield f"{site_path(site, twin)}.weight", site_weight(model, ref)
        if has_pooling_head(model):
            taken |= {name for name, _ in pooling_biases(model)}
            for _, parts in pooling_biases(model):
                yield from parts
        for name, tensor in model.state_dict().items():
            plain = name.replace("parametrizations.", "").removesuffix(".original")
            if plain not in taken and not is_lora(name):
                yield plain, tensor


def _type(model: nn.Module) -> str:
    """What transformers calls the architecture."""
    return str(model.config.model_type)  # type: ignore[union-attr]


def _layers(model: nn.Module, tower: Tower) -> nn.ModuleList | None:
    """The blocks of a tower; None where it is not built as CLIP's is (AltCLIP reads text with XLM-R)."""
    encoder = getattr(getattr(model, TOWER_MODULE[tower], None), "encoder", None)
    layers = getattr(encoder, "layers", None)
    return layers if isinstance(layers, nn.ModuleList) else None


def _sites(model: nn.Module, twin: Twin) -> Iterator[Site]:
    """The sites that are modules of their own."""
    for tower in TOWER_MODULE:
        layers = _layers(model, tower)
        assert layers is not None
        for role in EMBEDDINGS[tower]:
            yield Site(tower, None, role)
        for block in range(len(layers)):
            for role in BLOCK_ROLES:
                yield Site(tower, block, role)
        projected = tower == "text" or twin is CLIP
        if projected and _module_at(model, site_path(Site(tower, None, "proj"), twin)) is not None:
            yield Site(tower, None, "proj")


def _module_at(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _ref(model: nn.Module, site: Site, twin: Twin) -> SiteRef:
    path = site_path(site, twin)
    module = model.get_submodule(path)
    kind: SiteKind = "linear"
    if twin is SIGLIP2 and site == Site("vision", None, "position_embedding"):
        kind = "table"  # whose weight is resized to the grid of every image, and never looked up
    elif isinstance(module, nn.Embedding):
        kind = "embedding"
    elif isinstance(module, nn.Conv2d):
        kind = "conv"
    return SiteRef(site, path, "weight", kind, tuple(base_parameter(module, "weight").shape))


def _features(output: object) -> Tensor:
    """transformers 5 returns an output object, 4 a tensor."""
    features = output if isinstance(output, Tensor) else output.pooler_output  # type: ignore[attr-defined]
    assert isinstance(features, Tensor)
    return features


def _text_parts(model: Any) -> TextTower | None:
    """The parts of the text tower of a model whose type is one of `_PLAIN_TEXT`."""
    text, causal = model.text_model, _type(model) == "clip"
    blocks = _blocks("text", text)
    proj = linear_part(model.text_projection if causal else text.head, Site("text", None, "proj"))
    if blocks is None or proj is None:
        return None
    embeddings = text.embeddings
    return TextTower(
        Part(embeddings.token_embedding.weight, None, None, Site("text", None, "token_embedding")),
        Part(embeddings.position_embedding.weight, None, None, Site("text", None, "position_embedding")),
        *blocks,
        text.final_layer_norm,
        (proj,),
        causal,
    )


def _vision_parts(model: Any) -> VisionTower | None:
    """The parts of the vision tower of a model whose type is one of `_PLAIN_VISION`."""
    vision, pooled = model.vision_model, has_pooling_head(model)
    blocks = _blocks("vision", vision)
    proj = None if pooled else linear_part(model.visual_projection, Site("vision", None, "proj"))
    pool = pooling_parts(vision.head) if pooled else None
    if blocks is None or (proj is None and pool is None):
        return None
    embeddings = vision.embeddings
    conv, table = embeddings.patch_embedding, embeddings.position_embedding.weight
    height, width = conv.kernel_size
    return VisionTower(
        patch=(Part(conv.weight, conv.bias, None, Site("vision", None, "patch_embedding")),),
        patch_size=(height, width),
        class_embedding=getattr(embeddings, "class_embedding", None),
        positions=Part(table, None, None, Site("vision", None, "position_embedding")),
        norm_pre=getattr(vision, "pre_layrnorm", None),
        blocks=blocks[0],
        heads=blocks[1],
        norm=vision.post_layernorm,
        proj=None if proj is None else (proj,),
        pool=pool,
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
