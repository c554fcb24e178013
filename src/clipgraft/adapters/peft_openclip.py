"""Adapters that PEFT made on an open_clip model, whose attention is torch's `nn.MultiheadAttention`.

Wrapping `attn` adapts the fused q, k and v weights with one A (r, dim) and one B (3·dim, r), which is W + ΔW
as meant, and its `out_proj` with another pair, which PEFT 0.21 adds twice: it computes W + 2ΔW. Wrapping
`out_proj` itself has no effect at all, because MultiheadAttention reads that weight and never calls the
module. So what such an adapter was trained to do, and what its files say, are two things, and the reader has
to be told which one is wanted: `as-run` or `as-meant`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from clipgraft.adapters.adapter_file import AdapterFile, Weights, parts_of
from clipgraft.adapters.checkpoint import as_weight, lora_config, paired, some
from clipgraft.adapters.peft import named_base, read_variant
from clipgraft.errors import AdapterError
from clipgraft.models.openclip import path_site, split_path
from clipgraft.models.sites import Site

OutProj = Literal["as-run", "as-meant"]

_PREFIX = "base_model.model."
_NAME = re.compile(r"(?P<path>.+?)\.lora_(?:embedding_(?P<table>[AB])|(?P<part>[AB])\.weight)", re.DOTALL)
_INSIDE = ".base_layer.out_proj"
_WRAPPED, _BARE = f"attn{_INSIDE}", "attn.out_proj"
# With both `attn` and `out_proj` as targets PEFT saves the base weights of the latter too.
_INERT = (f"{_BARE}.base_layer.weight", f"{_BARE}.base_layer.bias")


def is_peft_openclip(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
    """Whether names or configuration are of an open_clip model rather than a transformers one."""
    mapping = config.get("auto_mapping")
    library = mapping.get("parent_library") if isinstance(mapping, Mapping) else None
    if isinstance(library, str) and library.partition(".")[0] == "open_clip":
        return True
    names = [name.removeprefix(_PREFIX) for name in tensors]
    return any("transformer.resblocks." in name or name.startswith("visual.") for name in names)


def read_peft_openclip(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path, out_proj: OutProj | None = None
) -> AdapterFile:
    """Read an adapter that PEFT made on an open_clip model.

    Args:
        tensors: `adapter_model.safetensors`.
        config: `adapter_config.json`.
        folder: named in errors.
        out_proj: what to make of updates of attention's `out_proj`: `as-run` is what PEFT 0.21 computed with
            them on open_clip 3 (twice the update of a wrapped `attn`, nothing of a wrapped `out_proj`),
            `as-meant` is the update once. Not needed where there are none.

    Raises:
        AdapterError: there are such updates and `out_proj` is None, the configuration is of something else
            than plain LoRA, names lie outside the model's sites, one half of a pair is missing, or weights
            and configuration disagree.
    """
    _, known = read_variant(config, folder, plain=True)
    rule = known.rules(folder)
    modules = _modules(tensors, folder)
    inner = {split_path(path)[2] for path in modules}
    if out_proj is None and inner & {_WRAPPED, _BARE}:
        raise AdapterError(_choice(folder, _WRAPPED in inner))
    alphas: dict[Site, float] = {}
    ranks: dict[Site, int] = {}
    weights: Weights = {}
    for path, module in modules.items():
        place = split_path(path)[2]
        if place == _BARE and out_proj == "as-run":
            continue
        # PEFT gives the out_proj inside a wrapped attention the rank and alpha of the attention.
        r, alpha = rule(path.removesuffix(_INSIDE))
        alpha *= 2 if place == _WRAPPED and out_proj == "as-run" else 1
        for site, pair in _sites(path, module, r, folder).items():
            if site in weights:
                raise AdapterError(
                    f"{folder} holds two updates of {site}, one of them without effect: pass "
                    "`peft_out_proj='as-run'`"
                )
            weights[site], ranks[site], alphas[site] = pair, r, alpha
    if not weights:
        raise AdapterError(
            f"{folder}: PEFT never ran what it holds (out_proj alone): pass `peft_out_proj='as-meant'`"
        )
    sites = sorted(weights, key=lambda site: site.order)
    settings = lora_config(
        folder,
        known.r,
        known.lora_alpha,
        {site: ranks[site] for site in sites},
        {site: alphas[site] for site in sites},
        dropout=known.lora_dropout,
        use_rslora=known.use_rslora,
    )
    parts = parts_of({site: weights[site] for site in sites})
    return AdapterFile(folder, parts, settings, base=named_base(config, "open_clip"))


def _choice(folder: Path, wrapped: bool) -> str:
    ran = "added them twice (W + 2ΔW)" if wrapped else "ignored them on open_clip 3"
    meant = "once" if wrapped else "once, as open_clip 4 does"
    return (
        f"{folder} holds PEFT updates of attention's out_proj, and PEFT {ran}: pass "
        f"`peft_out_proj='as-run'` for what it computed, or as-meant to add them {meant}"
    )


def _modules(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by the path of their module, which PEFT's patterns match."""
    halves: dict[str, dict[str, Tensor]] = {}
    surplus: list[str] = []
    for full, tensor in tensors.items():
        name = full.removeprefix(_PREFIX)
        match = _NAME.fullmatch(name)
        if match is None or not _is_known(match["path"], bool(match["table"])):
            if not _is_inert(name, tensors):
                surplus.append(repr(full))
            continue
        ndim = 4 if match["path"] == "visual.conv1" else 2
        halves.setdefault(match["path"], {})[match["table"] or match["part"]] = as_weight(
            tensor, full, folder, ndim
        )
    if surplus:
        raise AdapterError(
            f"{folder} holds {len(surplus)} weights that are no LoRA on a site of an open_clip model: "
            f"{some(surplus)}; train it without them, or drop them"
        )
    return paired(halves, folder)


def _is_known(path: str, table: bool) -> bool:
    _, block, inner = split_path(path)
    if block is not None and inner in ("attn", _WRAPPED):
        return not table
    site = path_site(path)
    # PEFT adapts modules; position tables are none.
    return (
        site is not None and site.role != "position_embedding" and table == (site.role == "token_embedding")
    )


def _is_inert(name: str, tensors: Mapping[str, Tensor]) -> bool:
    attention = name.partition(".attn.")[0]
    wrapped = f"{_PREFIX}{attention}.{_WRAPPED}.lora_A.weight" in tensors
    return wrapped and name in {f"{attention}.{inert}" for inert in _INERT}


def _sites(path: str, pair: tuple[Tensor, Tensor], r: int, folder: Path) -> Weights:
    """The sites of one module; a fused B is cut into those of q, k and v, which share their A."""
    (a, b), (tower, block, inner) = pair, split_path(path)
    if a.shape[0] != r:
        raise AdapterError(
            f"{folder}: {path} has A {tuple(a.shape)}, B {tuple(b.shape)} where the configuration "
            f"says rank {r}: the files are of two adapters; copy them together again"
        )
    if inner == _WRAPPED:
        return {Site(tower, block, "out"): (a, b)}
    if inner != "attn" or block is None:
        site = path_site(path)
        assert site is not None
        return {site: (a, b)}
    if b.shape[0] != 3 * a.shape[1]:
        raise AdapterError(
            f"{folder}: {path} has A {tuple(a.shape)}, B {tuple(b.shape)}, which is no fused q, k and "
            "v: save the adapter again"
        )
    parts = zip("qkv", b.chunk(3), strict=True)
    return {Site(tower, block, role): (a.clone(), part.clone()) for role, part in parts}
