"""What open_clip's weights are called in the class of transformers that holds the same ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from clipgraft.models.family import is_lora, site_bias, site_weight
from clipgraft.models.names import SIGLIP, Twin, site_path
from clipgraft.models.sites import POOL_ROLES, Site, SiteRef

_RENAMES = (
    ("visual.transformer.resblocks.", "vision_model.encoder.layers."),
    ("text.transformer.resblocks.", "text_model.encoder.layers."),
    ("transformer.resblocks.", "text_model.encoder.layers."),
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.ln_pre.", "vision_model.pre_layrnorm."),
    ("visual.ln_post.", "vision_model.post_layernorm."),
    ("text.ln_final.", "text_model.final_layer_norm."),
    ("ln_final.", "text_model.final_layer_norm."),
)
_BLOCK_RENAMES = (
    (".attn.", ".self_attn."),
    (".ln_1.", ".layer_norm1."),
    (".ln_2.", ".layer_norm2."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
)
_SIGLIP_RENAMES = (
    ("visual.trunk.blocks.", "vision_model.encoder.layers."),
    ("visual.trunk.norm.", "vision_model.post_layernorm."),
    ("visual.trunk.attn_pool.latent", "vision_model.head.probe"),
    ("visual.trunk.attn_pool.norm.", "vision_model.head.layernorm."),
    *_RENAMES,
)
_SIGLIP_BLOCK_RENAMES = ((".norm1.", ".layer_norm1."), (".norm2.", ".layer_norm2."), *_BLOCK_RENAMES)


def canonical_name(name: str, twin: Twin) -> str:
    """open_clip's state-dict name -> its twin's; names that the twin does not have stay as they are."""
    siglip = twin is SIGLIP
    for old, new in _SIGLIP_RENAMES if siglip else _RENAMES:
        if name.startswith(old):
            name = new + name.removeprefix(old)
            break
    padded = f"{name}."
    for old, new in _SIGLIP_BLOCK_RENAMES if siglip else _BLOCK_RENAMES:
        padded = padded.replace(old, new)
    return padded.rstrip(".")


def norm_path(name: str, twin: Twin) -> str:
    """The path of a layer norm in adapter files, below the tower's name in transformers."""
    # With a trailing dot, as the renames of modules have one.
    path = canonical_name(f"{name}.", twin).rstrip(".")
    return f"vision_model.{path.removeprefix('visual.')}" if path.startswith("visual.") else path


def canonical_weights(
    model: nn.Module, refs: Mapping[Site, SiteRef], twin: Twin
) -> Iterator[tuple[str, Tensor]]:
    """Base weights under the names of the twin, fused ones in the shares of their sites.

    Towers that no class of transformers holds keep open_clip's names, which they have had in the
    fingerprints of adapter files from before their sites were known.
    """
    named = [ref for ref in refs.values() if _goes_by_site(model, ref.site, twin)]
    for ref in named:
        yield f"{site_path(ref.site, twin)}.weight", site_weight(model, ref)
    taken = {f"{ref.module}.{ref.parameter}".lstrip(".") for ref in named}
    if twin is SIGLIP:
        for ref in named:
            bias = site_bias(model, ref)
            if bias is not None:
                taken |= {_bias_name(ref)}
                yield f"{site_path(ref.site, twin)}.bias", bias
    yield from _rest(model, taken, twin)


def _goes_by_site(model: nn.Module, site: Site, twin: Twin) -> bool:
    if twin is SIGLIP:
        return True
    if site.tower == "text":
        return not twin.paths
    return hasattr(model.visual, "transformer") and site.role not in POOL_ROLES


def _bias_name(ref: SiteRef) -> str:
    stem, _, leaf = f"{ref.module}.{ref.parameter}".lstrip(".").rpartition(".")
    return f"{stem}.{'in_proj_bias' if leaf == 'in_proj_weight' else 'bias'}"


def _rest(model: nn.Module, taken: set[str], twin: Twin) -> Iterator[tuple[str, Tensor]]:
    """Biases, norms and whatever else is not taken, fused biases split into q, k and v."""
    for name, tensor in model.state_dict().items():
        plain = name.replace("parametrizations.", "").removesuffix(".original")
        # A wrapped projection keeps its weight one level deeper than the bare Parameter was.
        if is_lora(name) or plain in taken or plain.removesuffix(".weight") in taken:
            continue
        if plain.endswith(".in_proj_bias"):
            stem = canonical_name(plain.removesuffix(".in_proj_bias"), twin)
            for role, part in zip("qkv", tensor.chunk(3), strict=True):
                yield f"{stem}.{role}_proj.bias", part
        else:
            yield canonical_name(plain, twin), tensor
