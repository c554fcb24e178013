"""Vision towers that open_clip takes from timm (`TimmModel`): their sites, found by how modules are built.

Whatever is not listed here (stems of several convolutions, squeeze-and-excitation, biases by relative
position) carries no update. A fused `qkv` is three sites with their own rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from clipgraft.models.family import base_parameter
from clipgraft.models.sites import POOL_ROLES, Site, SiteKind, SiteRef

_TRUNK = "visual.trunk"
# Where a residual block keeps what: attention, then gated and plain MLPs, then convolutions.
_PLACES = {
    "attn.q_proj": "q",
    "attn.k_proj": "k",
    "attn.v_proj": "v",
    "attn.proj": "out",
    "token_mixer.proj": "out",
    "mlp.fc1": "fc1",
    "mlp.fc1_x": "fc1",
    "mlp.fc1_g": "gate",
    "mlp.fc2": "fc2",
    "mlp.w0": "gate",
    "mlp.w1": "fc1",
    "mlp.w2": "fc2",
    "conv_dw": "conv_dw",
    "mlp.conv.conv": "conv_dw",
    "token_mixer.mixer.conv_kxk.0.conv": "mixer",
    "token_mixer.mixer.conv_scale.conv": "mixer_scale",
    "conv1_1x1": "conv1",
    "conv2_kxk": "conv_dw",
    "conv3_1x1": "conv3",
    "shortcut.expand": "shortcut",
}
_FUSED = ("attn", "token_mixer")
_POOL = {"q": "pool_q", "proj": "pool_out", "mlp.fc1": "pool_fc1", "mlp.fc2": "pool_fc2"}
# A projection of the wrapper comes after timm's own head, which is empty then.
_PROJECTIONS = {"head.proj": "proj", "trunk.head": "proj", "trunk.head.fc": "proj"}
_MLP_PROJECTION = {"head.mlp.fc1": "proj_fc1", "head.mlp.fc2": "proj_fc2"}


def timm_refs(visual: nn.Module) -> Iterator[SiteRef]:
    """The sites of a `TimmModel` that lies at `visual` in its model."""
    trunk: Any = visual.trunk
    yield from _embeddings(trunk)
    for number, path in enumerate(block_paths(trunk)):
        yield from _downsampling(trunk, path, number)
        yield from _block(trunk.get_submodule(path), f"{_TRUNK}.{path}", number)
    yield from _pooling(getattr(trunk, "attn_pool", None))
    for path, role in (_PROJECTIONS | _MLP_PROJECTION).items():
        yield from _ref(visual, path, "visual", Site("vision", None, role))


def block_paths(trunk: nn.Module) -> list[str]:
    """Paths of the residual blocks from input to output: items of lists that hold a known place."""
    lists = (nn.Sequential, nn.ModuleList)
    return [
        name
        for name, module in trunk.named_modules()
        if name and isinstance(trunk.get_submodule(name.rpartition(".")[0]), lists) and _is_block(module)
    ]


def is_siglip_tower(visual: nn.Module) -> bool:
    """Whether a tower is built as `SiglipVisionModel`: no class token, a pooling head, no projection."""
    trunk: Any = getattr(visual, "trunk", None)
    pool = getattr(trunk, "attn_pool", None)
    if trunk is None or pool is None or len(list(visual.head.parameters())):  # type: ignore[union-attr]
        return False
    # What transformers' head has not: several queries, norms of q and k, positions of its own.
    plain = getattr(pool, "latent_len", 0) == 1 and getattr(pool, "pos_embed", None) is None
    norms = [getattr(pool, name, None) for name in ("q_norm", "k_norm")]
    sites = {ref.site.role for ref in timm_refs(visual)}
    return (
        plain
        and all(isinstance(norm, nn.Identity) for norm in norms)
        and {*POOL_ROLES, "q", "k", "v", "out", "fc1", "fc2", "patch_embedding", "position_embedding"}
        == sites
        and not getattr(trunk, "num_prefix_tokens", 1)
        and isinstance(getattr(trunk, "norm_pre", None), nn.Identity)
        and isinstance(getattr(trunk, "fc_norm", None), nn.Identity)
        and all(ref.bias == "" and ref.kind != "read" for ref in timm_refs(visual))
    )


def _is_block(module: nn.Module) -> bool:
    fused = any(_fused_of(module, name) is not None for name in _FUSED)
    return fused or any(_place(module, path) is not None for path in _PLACES)


def _place(owner: nn.Module, path: str) -> nn.Module | None:
    """A plain Linear or convolution at a path; None for anything else."""
    for name in path.split("."):
        owner = getattr(owner, name, None)  # type: ignore[assignment]
        if not isinstance(owner, nn.Module):
            return None
    return owner if _is_plain(owner) else None


def _is_plain(module: nn.Module) -> bool:
    # torch gives a parametrised module a class of its own, below the one it had.
    kind = type(module).__mro__[1] if hasattr(module, "parametrizations") else type(module)
    if kind is nn.Linear:
        return True
    return kind is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str)


def _ref(owner: nn.Module, path: str, prefix: str, site: Site) -> Iterator[SiteRef]:
    module = _place(owner, path)
    if module is not None:
        kind: SiteKind = "linear" if isinstance(module, nn.Linear) else "conv"
        shape = tuple(base_parameter(module, "weight").shape)
        yield SiteRef(site, f"{prefix}.{path}", "weight", kind, shape)


def _block(block: nn.Module, path: str, number: int) -> Iterator[SiteRef]:
    for name in _FUSED:
        yield from _qkv(block, name, path, number)
    for place, role in _PLACES.items():
        yield from _ref(block, place, path, Site("vision", number, role))


def _fused_of(block: nn.Module, name: str) -> nn.Module | None:
    fused = _place(block, f"{name}.qkv")
    inner = _place(block, f"{name}.proj")
    if not isinstance(fused, nn.Linear) or not isinstance(inner, nn.Linear):
        return None
    return fused if fused.out_features == 3 * inner.in_features else None


def _qkv(block: nn.Module, name: str, path: str, number: int) -> Iterator[SiteRef]:
    """q, k and v of a fused Linear, which EVA's attention reads where it has biases of its own."""
    fused = _fused_of(block, name)
    if fused is None:
        return
    attention: Any = getattr(block, name)
    apart = isinstance(getattr(attention, "q_bias", None), Tensor)
    kind: SiteKind = "read" if apart and not attention.qkv_bias_separate else "rows"
    out, inner = base_parameter(fused, "weight").shape
    size = out // 3
    for position, role in enumerate("qkv"):
        rows = slice(position * size, (position + 1) * size)
        bias = f"{path}.{name}.{role}_bias" if apart and role != "k" else ""
        site = Site("vision", number, role)
        yield SiteRef(site, f"{path}.{name}.qkv", "weight", kind, (size, inner), rows, bias)


def _embeddings(trunk: Any) -> Iterator[SiteRef]:
    site = Site("vision", None, "patch_embedding")
    for path in ("patch_embed.proj", "stem.0"):
        stem = getattr(trunk, path.partition(".")[0], None)
        convolutions = [m for m in stem.modules() if isinstance(m, nn.Conv2d)] if stem is not None else []
        if len(convolutions) == 1:
            yield from _ref(trunk, path, _TRUNK, site)
    if not isinstance(getattr(trunk, "pos_embed", None), Tensor):
        return
    table = base_parameter(trunk, "pos_embed")
    if table.ndim == 3 and len(table) == 1:
        shape = tuple(table.shape[1:])
        site = Site("vision", None, "position_embedding")
        yield SiteRef(site, _TRUNK, "pos_embed", "table", shape)


def _downsampling(trunk: nn.Module, path: str, number: int) -> Iterator[SiteRef]:
    """What makes the map smaller before the first block of a stage."""
    blocks, _, index = path.rpartition(".")
    stage = blocks.rpartition(".")[0]
    down = getattr(trunk.get_submodule(stage), "downsample", None) if stage and index == "0" else None
    if not isinstance(down, nn.Module):
        return
    places = [name for name, module in down.named_modules() if name and _is_plain(module)]
    if len(places) == 1:
        site = Site("vision", number, "downsample")
        yield from _ref(down, places[0], f"{_TRUNK}.{stage}.downsample", site)


def _pooling(pool: Any) -> Iterator[SiteRef]:
    if pool is None:
        return
    for path, role in _POOL.items():
        yield from _ref(pool, path, f"{_TRUNK}.attn_pool", Site("vision", None, role))
    fused = _place(pool, "kv")
    if fused is None:
        return
    out, inner = base_parameter(fused, "weight").shape
    for position, role in enumerate("kv"):
        rows = slice(position * out // 2, (position + 1) * out // 2)
        site = Site("vision", None, f"pool_{role}")
        yield SiteRef(site, f"{_TRUNK}.attn_pool.kv", "weight", "rows", (out // 2, inner), rows)
