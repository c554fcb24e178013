"""Which sites to adapt: named sets, small expressions, and per-site overrides.

An expression is a comma-separated list of terms, read from left to right. A term is a named set
(`text-attention`) or a pattern `tower.blocks.roles` / `tower.role`, where blocks are `*`, `3`, `6-11` or `-1`
(from the end) and roles are `*` or one of q k v out fc1 fc2 (several joined by `+`). A leading `-` or `!`
takes the matches away again: `text.*.q+v,-text.0.*`. A bare role after a comma continues the pattern
before it, so that `text.*.q,v` means what it looks like.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from clipgraft.errors import TargetError
from clipgraft.models.sites import (
    ATTENTION_ROLES,
    BLOCK_ROLES,
    EMBEDDING_ROLES,
    MLP_ROLES,
    ROLES,
    TOWERS,
    Site,
)

_LINEAR = (*BLOCK_ROLES, "proj")


def _in(roles: Iterable[str], tower: str | None = None) -> Callable[[Site], bool]:
    wanted = frozenset(roles)
    return lambda site: site.role in wanted and tower in (None, site.tower)


def _embedding_set(tower: str) -> Callable[[Site], bool]:
    """One tower with its embeddings, and both projections (DESIGN §6: so their published counts are made)."""
    return lambda site: site.role == "proj" or (site.tower == tower and site.role in ROLES)


TARGET_SETS: dict[str, Callable[[Site], bool]] = {
    "text-attention": _in(ATTENTION_ROLES, "text"),
    "vision-attention": _in(ATTENTION_ROLES, "vision"),
    "attention": _in(ATTENTION_ROLES),
    "text-mlp": _in(MLP_ROLES, "text"),
    "vision-mlp": _in(MLP_ROLES, "vision"),
    "mlp": _in(MLP_ROLES),
    "projection": _in(("proj",)),
    "linear": _in(_LINEAR),
    "all-linear": _in(_LINEAR),
    "linear-text": _in(BLOCK_ROLES, "text"),
    "text-linear": _in(BLOCK_ROLES, "text"),
    "linear-vision": _in(BLOCK_ROLES, "vision"),
    "vision-linear": _in(BLOCK_ROLES, "vision"),
    "embedding": _in(EMBEDDING_ROLES),
    "linear+embedding": _in(ROLES),
    "linear+embedding-text": _embedding_set("text"),
    "linear+embedding-vision": _embedding_set("vision"),
    "all": _in(ROLES),
}

_GUIDE_ROLES = {"in_proj": ("q", "k", "v"), "out_proj": ("out",), "c_fc": ("fc1",), "c_proj": ("fc2",)}


def select_sites(sites: Sequence[Site], targets: str | Iterable[str]) -> list[Site]:
    """The sites an expression names, in model order.

    Args:
        sites: the sites the model has.
        targets: an expression, or a list of terms.

    Raises:
        TargetError: a term is not understood or matches nothing; the message lists near misses.
    """
    terms = _terms(targets.split(",") if isinstance(targets, str) else list(targets))
    chosen: set[Site] = set()
    for negative, term in terms:
        matched = match_sites(sites, term)
        chosen = chosen - set(matched) if negative else chosen | set(matched)
    if not chosen:
        raise TargetError(
            f"targets '{targets}' leave no site to adapt: remove an exclusion or name more sites"
        )
    return [site for site in sites if site in chosen]


def guide_targets(modules: Iterable[str]) -> str:
    """The guide's `--lora-target-modules` names (in_proj, out_proj, …), which mean the text tower."""
    roles: list[str] = []
    for module in modules:
        name = module.strip()
        if name not in _GUIDE_ROLES:
            known = ", ".join(_GUIDE_ROLES)
            raise TargetError(f"--lora-target-modules: '{name}' is unknown; allowed are {known}")
        roles.extend(_GUIDE_ROLES[name])
    if not roles:
        raise TargetError(f"--lora-target-modules is empty; allowed are {', '.join(_GUIDE_ROLES)}")
    return f"text.*.{'+'.join(roles)}"


def match_sites(sites: Sequence[Site], term: str) -> list[Site]:
    """Sites that one positive term matches; raises TargetError with near misses if there are none."""
    if term in TARGET_SETS:
        matched = [site for site in sites if TARGET_SETS[term](site)]
    else:
        matched = _match_pattern(sites, term)
    if not matched:
        raise TargetError(f"'{term}' matches no site of this model{_near_misses(sites, term)}")
    return matched


_V = TypeVar("_V")


def override_values(sites: Sequence[Site], pattern: Mapping[str, _V]) -> dict[Site, _V]:
    """Per-site values from `{term: value}`; later terms win.

    Raises:
        TargetError: a term matches none of `sites`; the message lists near misses.
    """
    values: dict[Site, _V] = {}
    for term, value in pattern.items():
        values.update(dict.fromkeys(match_sites(sites, term.strip()), value))
    return values


def _terms(raw: Sequence[str]) -> list[tuple[bool, str]]:
    terms: list[tuple[bool, str]] = []
    for text in (part.strip() for part in raw):
        if not text:
            continue
        negative = text[0] in "-!"
        term = text.lstrip("-!") if negative else text
        if terms and not negative and term in BLOCK_ROLES and terms[-1][1].count(".") == 2:
            prefix = terms[-1][1].rpartition(".")[0]
            terms.append((terms[-1][0], f"{prefix}.{term}"))
        else:
            terms.append((negative, term))
    return terms


def _match_pattern(sites: Sequence[Site], term: str) -> list[Site]:
    tower, *rest = term.split(".")
    if tower not in (*TOWERS, "*") or not 1 <= len(rest) <= 2:
        return []
    in_tower = [site for site in sites if tower in ("*", site.tower)]
    roles = set(rest[-1].split("+"))
    if len(rest) == 1:
        named = rest[0] == "*"
        return [site for site in in_tower if named or (site.block is None and site.role in roles)]
    matched = [site for site in in_tower if site.block is not None and ("*" in roles or site.role in roles)]
    depths = {name: 1 + max((s.block or 0 for s in sites if s.tower == name), default=-1) for name in TOWERS}
    return [site for site in matched if _in_blocks(site.block or 0, rest[0], depths[site.tower])]


def _in_blocks(block: int, blocks: str, depth: int) -> bool:
    """Whether a block number is in `*`, `3`, `-1`, `6-11` or a `+`-joined list of them."""
    for part in blocks.split("+"):
        first, dash, last = part.removeprefix("-").partition("-")
        sign = -1 if part.startswith("-") else 1
        if part == "*":
            return True
        if not first.isdigit() or (dash and not last.isdigit()):
            continue
        start = int(first) if sign == 1 else depth - int(first)
        if (start <= block <= int(last)) if dash else block == start:
            return True
    return False


def _near_misses(sites: Sequence[Site], term: str) -> str:
    known = [*TARGET_SETS, *map(str, sites)]
    close = difflib.get_close_matches(term, known, n=4, cutoff=0.5)
    return f"; near misses: {', '.join(close)}" if close else f"; target sets are {', '.join(TARGET_SETS)}"
