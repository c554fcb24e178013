"""The guide's two `.pt` layouts, LoRA alone and LoRA with the base, read and written.

Both hold `lora_config` (model, pretrained, r, alpha, dropout, target_modules); the first has the weights in
`lora_state_dict`, the second among all of the model's in `state_dict`. The guide adapts q, k, v and out of
the text tower, at one rank r and one scale α/r; `uniform` says how other ranks and scales are expressed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipgraft.adapters.adapter_file import (
    KEY,
    AdapterFile,
    Extras,
    Weights,
    extras_of,
    parts_of,
    uniform,
    with_extras,
)
from clipgraft.adapters.checkpoint import (
    AGAIN,
    as_record,
    as_weight,
    lora_config,
    paired,
    save_checkpoint,
    some,
)
from clipgraft.errors import AdapterError, TargetError
from clipgraft.lora.config import LoraConfig, as_written
from clipgraft.lora.targets import override_values
from clipgraft.models import names, openclip
from clipgraft.models.family import is_lora
from clipgraft.models.sites import ATTENTION_ROLES, BLOCK_ROLES, EMBEDDING_ROLES, TOWERS, Site
from clipgraft.records import Finite, Flag, Rank

_LORA, _FULL, _CONFIG = "lora_state_dict", "state_dict", "lora_config"


@dataclass(frozen=True)
class _Config:
    """`lora_config`: what made the weights."""

    r: Rank
    alpha: Finite
    dropout: Finite = 0.0
    model: str | None = None
    name: str | None = None
    pretrained: str | None = None
    targets: str | None = None
    use_rslora: Flag = False
    train_logit_scale: Flag = True
    rank_pattern: dict[str, Rank] = field(default_factory=dict)
    alpha_pattern: dict[str, Finite] = field(default_factory=dict)


@dataclass(frozen=True)
class _File:
    """A checkpoint of the guide; of the two dictionaries of weights it has one."""

    lora_state_dict: dict[str, Any] | None = None
    state_dict: dict[str, Any] | None = None
    lora_config: _Config | None = None
    clipgraft: Extras | None = None


def read_guide(data: Mapping[str, Any], path: Path) -> AdapterFile:
    """Read a checkpoint of the guide, or the `.pt` that clipgraft writes beside an adapter.

    `data` is what `read_checkpoint` made of `path`.

    Raises:
        AdapterError: it is damaged, or holds no LoRA.
    """
    file = as_record(data, _File, path)
    alone = file.lora_state_dict is not None
    found = file.lora_state_dict if alone else file.state_dict
    state = {bare_name(name): value for name, value in (found or {}).items()}
    weights = _weights(state, path, alone)
    config = file.lora_config
    if config is None:
        raise AdapterError(
            f"{path} has LoRA weights and no {_CONFIG!r}: their alpha, and so their effect, is unknown; "
            f"add {_CONFIG} with model, pretrained, r, alpha, dropout and target_modules"
        )
    family = "transformers" if any(name.startswith("text_model.") for name in state) else "open_clip"
    base = {
        "name": config.model or config.name or "",
        "pretrained": config.pretrained or "",
        "family": family,
    }
    adapter = AdapterFile(path, parts_of(weights), _settings(weights, config, state, path), base=base)
    if file.clipgraft is not None:
        return with_extras(adapter, file.clipgraft)
    # The guide's runs train the temperature with the rest; clipgraft's say whether they did.
    scale, bias = (
        _scalar(state, name) if config.train_logit_scale else None for name in ("logit_scale", "logit_bias")
    )
    settings = adapter.settings.replace(train_logit_scale=scale is not None)
    return replace(adapter, settings=settings, logit_scale=scale, logit_bias=bias)


def _weights(state: Mapping[str, Any], path: Path, alone: bool) -> Weights:
    halves: dict[Site, dict[str, Tensor]] = {}
    surplus: list[str] = []
    for name, value in state.items():
        found = lora_site(name)
        if found is not None:
            site, part = found
            ndim = 4 if site.role == "patch_embedding" else 2
            halves.setdefault(site, {})[part] = as_weight(value, name, path, ndim)
        elif alone or is_lora(name):
            surplus.append(repr(name))
    if surplus:
        raise AdapterError(
            f"{path} holds {len(surplus)} weights that belong to no site of a CLIP model: {some(surplus)}; "
            "drop them, or make the adapter with the guide's names"
        )
    return dict(sorted(paired(halves, path).items(), key=lambda item: item[0].order))


def _scalar(state: Mapping[str, Any], name: str) -> float | None:
    value = state.get(name)
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        return None
    return float(value) if torch.isfinite(value).all() else None


def _settings(weights: Weights, config: _Config, state: Mapping[str, Any], path: Path) -> LoraConfig:
    sites = _all_sites(weights, state)
    try:
        ranks = override_values(sites, list(weights), config.rank_pattern)
        alphas = override_values(sites, list(weights), config.alpha_pattern)
    except TargetError as error:
        raise AdapterError(f"{path}: {error}: {AGAIN}") from error
    own_ranks = {site: int(ranks.get(site, config.r)) for site in weights}
    settings = lora_config(
        path,
        config.r,
        config.alpha,
        own_ranks,
        alphas,
        dropout=config.dropout,
        use_rslora=config.use_rslora,
        **({"targets": config.targets} if config.targets else {}),
    )
    for site, (a, b) in weights.items():
        if a.shape[0] != own_ranks[site]:
            raise AdapterError(
                f"{path}: {site} has A {tuple(a.shape)}, B {tuple(b.shape)} where {_CONFIG} says rank "
                f"{own_ranks[site]}: they are of two adapters; save it again"
            )
    return settings


def _all_sites(weights: Weights, state: Mapping[str, Any]) -> list[Site]:
    """Every site of the model a checkpoint was made of, for patterns that count blocks from the end."""
    found = {site for site in map(_site_of, state) if site is not None} | {*weights}
    blocks = {(site.tower, site.block) for site in found if site.block is not None}
    sites = {Site(tower, block, role) for tower, block in blocks for role in BLOCK_ROLES}
    sites |= found | {Site(tower, None, role) for tower in TOWERS for role in (*EMBEDDING_ROLES, "proj")}
    return sorted(sites, key=lambda site: site.order)


def _site_of(name: str) -> Site | None:
    """The site of a LoRA weight, or of a base weight that shows how deep a tower is."""
    found = lora_site(name) or lora_site(f"{name.removesuffix('.weight')}.lora.lora_A")
    return None if found is None else found[0]


def write_guide(adapter: AdapterFile, path: str | Path, epoch: int = 0) -> Path:
    """Write LoRA alone, as the guide's `--save-lora-only` does.

    Args:
        adapter: q, k, v and out of the text tower, any ranks and scales.
        path: the `.pt` file.
        epoch: what the file says it was saved after.

    Raises:
        AdapterError: the adapter has sites or lacks a base name that the format needs, or the file cannot
            be written.
    """
    state, config = _lora(adapter)
    save_checkpoint({"epoch": epoch, _LORA: state, _CONFIG: config, KEY: extras_of(adapter)}, Path(path))
    return Path(path)


def write_guide_full(
    adapter: AdapterFile, base_state_dict: Mapping[str, Tensor], path: str | Path, epoch: int = 0
) -> Path:
    """Write LoRA among all weights of its base, an open_clip `CLIP`.

    Args:
        adapter: as for `write_guide`; its temperature replaces the base's, if it has one.
        base_state_dict: `state_dict()` of the base without adapters.
        path: the `.pt` file.
        epoch: what the file says it was saved after.

    Raises:
        AdapterError: as `write_guide`, or the base is none that the adapter fits.
    """
    lora, config = _lora(adapter)
    _check_base(adapter, base_state_dict)
    state = {name: weight.detach().cpu() for name, weight in base_state_dict.items()} | lora
    for name, value in adapter.temperature.items():
        state[name] = torch.full_like(state[name], value)
    save_checkpoint({"epoch": epoch, _FULL: state, _CONFIG: config, KEY: extras_of(adapter)}, Path(path))
    return Path(path)


def _lora(adapter: AdapterFile) -> tuple[dict[str, Tensor], dict[str, Any]]:
    adapter.require_plain("a checkpoint of the guide")
    foreign = [
        str(site) for site in adapter.weights if site.tower != "text" or site.role not in ATTENTION_ROLES
    ]
    if foreign:
        raise AdapterError(
            f"{adapter.path}: a checkpoint of the guide holds q, k, v and out of the text tower, and not "
            f"{some(foreign)}; write another format, or train on `targets='text-attention'`"
        )
    if not adapter.base.get("name"):
        raise AdapterError(
            f"{adapter.path} does not name its base, which a checkpoint of the guide must: "
            "pass `model` and `pretrained`"
        )
    update = uniform(adapter)
    state: dict[str, Tensor] = {}
    for site, (a, b) in update.weights.items():
        stem = f"transformer.resblocks.{site.block}.lora_{site.role}"
        state |= {f"{stem}.lora_A": a, f"{stem}.lora_B": b}
    roles = {site.role for site in adapter.weights}
    config = {
        "model": adapter.base["name"],
        "pretrained": adapter.base.get("pretrained", ""),
        "r": update.r,
        "alpha": as_written(update.scale * update.r),
        "dropout": adapter.settings.dropout,
        "target_modules": ["in_proj"] * bool(roles - {"out"}) + ["out_proj"] * ("out" in roles),
    }
    return state, config


def _check_base(adapter: AdapterFile, base: Mapping[str, Tensor]) -> None:
    if any(is_lora(name) for name in base):
        raise AdapterError("the base carries LoRA itself: call remove_lora(model) before writing it")
    if lacking := adapter.temperature.keys() - base.keys():
        raise AdapterError(
            f"{adapter.path} has a trained {some(sorted(lacking))}, and the base has none: pass the "
            "open_clip model that it was made for as `model` and `pretrained`"
        )
    for site, (a, b) in adapter.weights.items():
        weight = base.get(f"transformer.resblocks.{site.block}.attn.in_proj_weight")
        if weight is None or weight.shape[1] != a.shape[1] or weight.shape[1] != b.shape[0]:
            raise AdapterError(
                f"{adapter.path}: the base has no {site} of width {a.shape[1]}, or is no open_clip CLIP: "
                "pass the open_clip model that it was made for as `model` and `pretrained`"
            )


_WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel and torch.compile
_NAME = re.compile(r"(?P<host>.+)\.lora_(?P<part>[AB])", re.DOTALL)
_TABLE = re.compile(r"parametrizations\.(?P<name>\w+)\.0$")


def bare_name(name: str) -> str:
    """A state-dict name without the prefixes of wrappers."""
    while wrapper := next((prefix for prefix in _WRAPPERS if name.startswith(prefix)), None):
        name = name.removeprefix(wrapper)
    return name


def lora_site(name: str) -> tuple[Site, str] | None:
    """The site of a LoRA weight, and `A` or `B`; None for names of anything else.

    Known are the guide's names, site names (`text.0.q.lora_A`), and those of models of either family that
    carry clipgraft's layers.
    """
    match = _NAME.fullmatch(bare_name(name))
    if match is None:
        return None
    # Models keep each adapter under its name: `attn.lora_q.default.lora_A`.
    hosts = (match["host"], match["host"].rpartition(".")[0])
    sites = (_named_site(host) or _host_site(host) for host in hosts)
    site = next((found for found in sites if found is not None), None)
    return None if site is None else (site, match["part"])


def _named_site(host: str) -> Site | None:
    try:
        return Site.parse(host)
    except TargetError:
        return None


def _host_site(host: str) -> Site | None:
    owner, _, leaf = host.rpartition(".")
    role = leaf.removeprefix("lora_")
    if leaf != "lora":
        tower, block, inner = openclip.split_path(owner)
        known = role != leaf and role in ATTENTION_ROLES and block is not None and inner in ("", "attn")
        return Site(tower, block, role) if known else None
    path = _TABLE.sub(r"\g<name>", owner)
    try:
        return openclip.path_site(path) or names.path_site(path)
    except AdapterError:
        return None
