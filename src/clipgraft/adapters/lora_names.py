"""Names of LoRA weights in state dicts: the guide's, and those of models with clipgraft's own layers."""

from __future__ import annotations

import re
from typing import Literal

from clipgraft.errors import AdapterError, TargetError
from clipgraft.models import hf, openclip
from clipgraft.models.sites import ATTENTION_ROLES, Site

_WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel and torch.compile
_NAME = re.compile(r"(?P<host>.+)\.lora_(?P<part>[AB])", re.DOTALL)
_TABLE = re.compile(r"parametrizations\.(?P<name>\w+)\.0$")


def guide_name(site: Site, part: Literal["A", "B"]) -> str:
    """The guide's name of a text attention site: `transformer.resblocks.0.lora_q.lora_A`."""
    return f"transformer.resblocks.{site.block}.lora_{site.role}.lora_{part}"


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
        return openclip.path_site(path) or hf.path_site(path)
    except AdapterError:
        return None
