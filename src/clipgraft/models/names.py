"""Module paths of sites in transformers' classes, in which adapter files and fingerprints name weights.

A base is named like its twin, the class of transformers that holds the same weights: `CLIPModel`,
`SiglipModel` or `Siglip2Model`. Sites that no such class has (gates, convolutions, …) get paths of the same
form, below the block that they are in. A base that is built otherwise goes by its own module paths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from clipgraft.errors import AdapterError
from clipgraft.models.sites import (
    BLOCK_ROLES,
    CONV_ROLES,
    EMBEDDING_ROLES,
    POOL_ROLES,
    ROLES_IN_BLOCKS,
    Site,
    SiteKind,
    SiteRef,
    Tower,
    block_number,
)


@dataclass(frozen=True)
class Twin:
    """A class of transformers whose module names a base goes by.

    Attributes:
        name: of the class.
        library: the module that it is in.
        text_projection: where it keeps the projection of texts; that of images is `visual_projection`.
        prefix: what its module paths lack of those of a model with both towers: `text_model.` where the tower
            alone is the model.
        paths: the base's own module paths by site, where it goes by those.
        foreign: sites among `paths` at which PEFT has no module to adapt.
    """

    name: str
    library: str
    text_projection: str = ""
    prefix: str = ""
    paths: Mapping[Site, str] = field(default_factory=dict)
    foreign: frozenset[Site] = frozenset()

    def saved(self, path: str) -> str:
        """A module path as adapter files have it."""
        return path.removeprefix(self.prefix)


CLIP = Twin("CLIPModel", "transformers.models.clip.modeling_clip", "text_projection")
SIGLIP = Twin("SiglipModel", "transformers.models.siglip.modeling_siglip", "text_model.head")
SIGLIP2 = Twin("Siglip2Model", "transformers.models.siglip2.modeling_siglip2", "text_model.head")
TWINS = {twin.name: twin for twin in (CLIP, SIGLIP, SIGLIP2)}

TOWER_MODULE: dict[Tower, str] = {"text": "text_model", "vision": "vision_model"}
_ATTENTION = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}
_BLOCK = {
    **{role: f"self_attn.{module}" for role, module in _ATTENTION.items()},
    **{role: f"mlp.{role}" for role in ("fc1", "gate", "fc2")},
    **{role: f"conv.{role}" for role in CONV_ROLES},
}
_POOL = {
    **{f"pool_{role}": f"head.attention.{module}" for role, module in _ATTENTION.items()},
    **{f"pool_{role}": f"head.mlp.{role}" for role in ("fc1", "fc2")},
}
_VISION_PROJECTION = {
    "proj": "visual_projection",
    "proj_fc1": "visual_projection.fc1",
    "proj_fc2": "visual_projection.fc2",
}
EMBEDDINGS: dict[Tower, tuple[str, ...]] = {
    "text": ("token_embedding", "position_embedding"),
    "vision": ("patch_embedding", "position_embedding"),
}
_MODULES: tuple[SiteKind, ...] = ("linear", "embedding", "conv")
# In transformers, Parameters of `nn.MultiheadAttention`: PEFT knows no modules of these names.
_NO_MODULES = tuple(f"pool_{role}" for role in _ATTENTION)


def own_twin(model: object, refs: Mapping[Site, SiteRef]) -> Twin:
    """A base that goes by its own module paths: stock PEFT opens its adapters on the model itself."""
    modules = {site: ref.module for site, ref in refs.items() if ref.kind in _MODULES}
    others = {
        site: f"{ref.module}.{ref.parameter if ref.kind == 'table' else site.role}".lstrip(".")
        for site, ref in refs.items()
        if site not in modules
    }
    kind = type(model)
    return Twin(kind.__name__, kind.__module__, paths={**modules, **others}, foreign=frozenset(others))


def recorded_twin(name: str, library: str, paths: Mapping[Site, str], foreign: bool) -> Twin:
    """The names of an adapter file that records its sites beside their paths; `foreign` to PEFT or not."""
    return Twin(name, library, paths=paths, foreign=frozenset(paths) if foreign else frozenset())


def site_path(site: Site, twin: Twin = CLIP) -> str:
    """Module path of a site in the twin of its base."""
    if twin.paths:
        return twin.paths[site]
    tower = TOWER_MODULE[site.tower]
    if site.block is not None:
        return f"{tower}.encoder.layers.{site.block}.{_BLOCK[site.role]}"
    if site.role in EMBEDDING_ROLES:
        return f"{tower}.embeddings.{site.role}"
    if site.role in POOL_ROLES:
        return f"{tower}.{_POOL[site.role]}"
    return twin.text_projection if site.tower == "text" else _VISION_PROJECTION[site.role]


def path_site(path: str, twin: Twin = CLIP) -> Site:
    """The site at a module path of any twin, `twin` first; raises AdapterError if no site lives there."""
    if twin.paths:
        own = {known: site for site, known in twin.paths.items()}
        if path in own:
            return own[path]
        raise AdapterError(f"'{path}' is no module of {twin.name} that can carry LoRA")
    site = _WHOLE.get(path)
    if site is not None:
        return site
    for tower, prefix in TOWER_MODULE.items():
        layers, _, inner = path.partition(".encoder.layers.")
        index, _, rest = inner.partition(".")
        block = block_number(index)
        if layers == prefix and block is not None and rest in _ROLE_IN_BLOCK:
            return Site(tower, block, _ROLE_IN_BLOCK[rest])
    raise AdapterError(f"'{path}' is no module of transformers.CLIPModel or SiglipModel that can carry LoRA")


def is_module_of(site: Site, twin: Twin) -> bool:
    """Whether the twin calls a module of its own at the site, so that stock PEFT can adapt it alone."""
    if twin.paths:
        return site not in twin.foreign
    if site.role in _NO_MODULES:
        return False
    if site.block is not None:
        return site.role in BLOCK_ROLES
    if site.tower == "vision" and site.role in _VISION_PROJECTION:
        return twin.text_projection == CLIP.text_projection and site.role == "proj"
    if site.role in POOL_ROLES:
        return twin is not CLIP
    # Siglip2Model reads the table without calling the module, so that PEFT's update would be ignored.
    return not (twin is SIGLIP2 and site == Site("vision", None, "position_embedding"))


_ROLE_IN_BLOCK = {_BLOCK[role]: role for role in ROLES_IN_BLOCKS}
_WHOLE = {
    **{
        f"{TOWER_MODULE[t]}.embeddings.{role}": Site(t, None, role)
        for t in EMBEDDINGS
        for role in EMBEDDINGS[t]
    },
    **{f"vision_model.{path}": Site("vision", None, role) for role, path in _POOL.items()},
    **{path: Site("vision", None, role) for role, path in _VISION_PROJECTION.items()},
    **{twin.text_projection: Site("text", None, "proj") for twin in TWINS.values()},
}
