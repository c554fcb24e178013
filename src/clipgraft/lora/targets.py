"""Select sites to adapt: named sets, small expressions, and per-site overrides.

An expression is a comma-separated list of terms, read from left to right. A term is a named set
(`text-attention`) or a pattern `tower.blocks.roles` or `tower.role`. The tower may be `*`; blocks are `*`,
`3`, `6-11` or `-1` (from the end); roles are `*` or those of blocks (`models/sites.py`). Several blocks
or roles are joined by `+`, and each must match. A leading `-` or `!` takes matches away again:
`text.*.q+v,-text.0.*`. A bare role after a comma continues the pattern before it, so that `text.*.q,v` means
what it looks like.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from clipgraft.errors import TargetError
from clipgraft.models.sites import (
    ATTENTION_ROLES,
    CONV_ROLES,
    EMBEDDING_ROLES,
    MLP_ROLES,
    POOL_ATTENTION_ROLES,
    POOL_ROLES,
    PROJECTION_ROLES,
    ROLES,
    ROLES_IN_BLOCKS,
    TOWERS,
    Site,
)

_ATTENTION = (*ATTENTION_ROLES, *POOL_ATTENTION_ROLES)
_MLP = (*MLP_ROLES, "gate", "pool_fc1", "pool_fc2")
_TOWER_LINEAR = (*_ATTENTION, *_MLP)
_LINEAR = (*_TOWER_LINEAR, *PROJECTION_ROLES)
# Tables of one vector an id. The patch embedding is a convolution and belongs to `all` alone.
_TABLES = tuple(role for role in EMBEDDING_ROLES if role != "patch_embedding")


def _in(roles: Iterable[str], tower: str | None = None) -> Callable[[Site], bool]:
    wanted = frozenset(roles)
    return lambda site: site.role in wanted and tower in (None, site.tower)


def _embedding_set(tower: str) -> Callable[[Site], bool]:
    """One tower with its embeddings, and both projections (DESIGN §6: so their published counts are made)."""
    return lambda site: (
        site.role in PROJECTION_ROLES or (site.tower == tower and site.role in (*_TABLES, *_LINEAR))
    )


TARGET_SETS: dict[str, Callable[[Site], bool]] = {
    "text-attention": _in(_ATTENTION, "text"),
    "vision-attention": _in(_ATTENTION, "vision"),
    "attention": _in(_ATTENTION),
    "text-mlp": _in(_MLP, "text"),
    "vision-mlp": _in(_MLP, "vision"),
    "mlp": _in(_MLP),
    "pooling": _in(POOL_ROLES),
    "convolutions": _in(("patch_embedding", *CONV_ROLES)),
    "projection": _in(PROJECTION_ROLES),
    "linear": _in(_LINEAR),
    "all-linear": _in(_LINEAR),
    "text-matrices": _in((*_TOWER_LINEAR, "token_embedding", "proj"), "text"),
    "linear-text": _in(_TOWER_LINEAR, "text"),
    "text-linear": _in(_TOWER_LINEAR, "text"),
    "linear-vision": _in(_TOWER_LINEAR, "vision"),
    "vision-linear": _in(_TOWER_LINEAR, "vision"),
    "embedding": _in(_TABLES),
    "linear+embedding": _in((*_TABLES, *_LINEAR)),
    "linear+embedding-text": _embedding_set("text"),
    "text-linear+embedding": _embedding_set("text"),
    "linear+embedding-vision": _embedding_set("vision"),
    "vision-linear+embedding": _embedding_set("vision"),
    "all": _in(ROLES),
}

_BLOCKS = re.compile(r"-(?P<end>[0-9]{1,9})|(?P<first>[0-9]{1,9})(?:-(?P<last>[0-9]{1,9}))?")
_GUIDE_ROLES = {"in_proj": ("q", "k", "v"), "out_proj": ("out",), "c_fc": ("fc1",), "c_proj": ("fc2",)}


def select_sites(sites: Sequence[Site], targets: str | Iterable[str]) -> list[Site]:
    """Return the sites that an expression names, in model order.

    Args:
        sites: the sites the model has.
        targets: an expression, or a list of terms.

    Raises:
        TargetError: a term is not understood or matches nothing; the message lists near misses.
    """
    expression = targets if isinstance(targets, str) else ",".join(targets)
    chosen: set[Site] = set()
    for negative, term in _terms(expression.split(",")):
        matched = match_sites(sites, term)
        chosen = chosen - set(matched) if negative else chosen | set(matched)
    if not chosen:
        raise TargetError(
            f"targets {expression!r} leave no site to adapt: remove an exclusion or name more sites"
        )
    return [site for site in sites if site in chosen]


def named_sets(targets: str) -> list[str]:
    """The named sets among the positive terms of an expression."""
    return [term for negative, term in _terms(targets.split(",")) if not negative and term in TARGET_SETS]


def guide_targets(modules: Iterable[str]) -> str:
    """Translate the guide's target modules (in_proj, out_proj, …), which mean the text tower."""
    roles: list[str] = []
    for module in modules:
        name = module.strip()
        if name not in _GUIDE_ROLES:
            known = ", ".join(_GUIDE_ROLES)
            raise TargetError(f"`target_modules`: {name!r} is unknown; allowed are {known}")
        roles.extend(_GUIDE_ROLES[name])
    if not roles:
        raise TargetError(f"`target_modules` is empty; allowed are {', '.join(_GUIDE_ROLES)}")
    return f"text.*.{'+'.join(roles)}"


def match_sites(sites: Sequence[Site], term: str) -> list[Site]:
    """Return the sites that one positive term matches; raises TargetError with near misses if none does."""
    if term in TARGET_SETS:
        matched = {site for site in sites if TARGET_SETS[term](site)}
    else:
        matched = _match_pattern(sites, term)
    if not matched:
        raise TargetError(f"{term!r} matches no site of this model{_lone(sites, term)}")
    return [site for site in sites if site in matched]


_V = TypeVar("_V")


def override_values(
    sites: Sequence[Site], adapted: Sequence[Site], pattern: Mapping[str, _V]
) -> dict[Site, _V]:
    """Return the value of each adapted site from `{term: value}`; later terms win.

    Args:
        sites: the sites the model has; `-1` is the last block of a tower, adapted or not.
        adapted: those that carry an update.
        pattern: values by term.

    Raises:
        TargetError: a term matches no adapted site; the message lists near misses.
    """
    values: dict[Site, _V] = {}
    for term, value in pattern.items():
        matched = set(match_sites(sites, term.strip()))
        overridden = [site for site in adapted if site in matched]
        if not overridden:
            raise TargetError(f"{term!r} matches none of the adapted sites{_near_misses(adapted, term)}")
        values.update(dict.fromkeys(overridden, value))
    return values


def _terms(raw: Sequence[str]) -> list[tuple[bool, str]]:
    terms: list[tuple[bool, str]] = []
    for text in (part.strip() for part in raw):
        if not text:
            continue
        negative = text[0] in "-!"
        term = text[1:].strip() if negative else text
        continues = terms and not negative and set(term.split("+")) <= {*ROLES_IN_BLOCKS}
        if continues and terms[-1][1].count(".") == 2:
            term = f"{terms[-1][1].rpartition('.')[0]}.{term}"
            negative = terms[-1][0]
        terms.append((negative, term))
    return terms


def _match_pattern(sites: Sequence[Site], term: str) -> set[Site]:
    """Sites of a pattern; empty too if one of its `+`-joined parts matches none, as a misspelt one does."""
    tower, *rest = term.split(".")
    if tower not in (*TOWERS, "*") or not 1 <= len(rest) <= 2:
        return set()
    in_tower = [site for site in sites if tower in ("*", site.tower)]
    if len(rest) == 1:
        parts = [{s for s in in_tower if _has_role(s, role)} for role in rest[0].split("+")]
        return set().union(*parts) if all(parts) else set()
    in_blocks = [site for site in in_tower if site.block is not None]
    depths = {name: 1 + max((s.block or 0 for s in sites if s.tower == name), default=-1) for name in TOWERS}
    parts = [
        {s for s in in_blocks if role in ("*", s.role) and _in_blocks(s.block or 0, blocks, depths[s.tower])}
        for role in rest[1].split("+")
        for blocks in rest[0].split("+")
    ]
    return set().union(*parts) if all(parts) else set()


def _has_role(site: Site, role: str) -> bool:
    """Whether `tower.role` names a site: any for `*`, else an embedding or a projection."""
    return role == "*" or (site.block is None and site.role == role)


def _in_blocks(block: int, blocks: str, depth: int) -> bool:
    """Whether a block number is in `*`, `3`, `-1` (from the end) or `6-11` (both ends included)."""
    match = _BLOCKS.fullmatch(blocks)
    if match is None:
        return blocks == "*"
    start = depth - int(match["end"]) if match["end"] else int(match["first"])
    return start <= block <= int(match["last"] or start)


def _lone(sites: Sequence[Site], term: str) -> str:
    """What else to name, for a set of a model with one tower alone; else near misses."""
    towers = {site.tower for site in sites}
    if term not in TARGET_SETS or len(towers) != 1:
        return _near_misses(sites, term)
    only = towers.pop()
    return f", which has sites in its {only} tower alone: name that, e.g. {only}-attention"


def _near_misses(sites: Sequence[Site], term: str) -> str:
    known = [*TARGET_SETS, *map(str, sites)]
    close = difflib.get_close_matches(term, known, n=4, cutoff=0.5)
    return f"; near misses: {', '.join(close)}" if close else f"; target sets are {', '.join(TARGET_SETS)}"
