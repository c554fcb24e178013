"""Adapters of MaxZanella/CLIP-LoRA (Zanella & Ben Ayed 2024, arXiv:2405.18541), read and written.

A file is `{"weights": {"layer_0": {"q_proj": {"w_lora_A", "w_lora_B"}, …}, …}, "metadata": {r, alpha,
encoder, params, position}}`. Attention weights alone are adapted: `q_proj`, `k_proj`, `v_proj`, `proj` (the
output), named q, k, v, o in `params`; A is (r, width), B (width, r), ΔW = α/√r·B·A without a transpose.
The layers of a file are the attention modules that `position` names, those of the text tower first, numbered
through from 0. Which tower a layer belongs to, and its block, are not in the file: `_layout` works them out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from clipgraft.adapters.adapter_file import (
    KEY,
    AdapterFile,
    Extras,
    extras_of,
    parts_of,
    rescaled,
    uniform,
    with_extras,
)
from clipgraft.adapters.checkpoint import (
    as_record,
    as_weight,
    lora_config,
    paired,
    save_checkpoint,
    some,
)
from clipgraft.errors import AdapterError
from clipgraft.models.sites import TOWERS, Site, Tower
from clipgraft.records import Finite, Rank

_ROLES = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "proj": "out"}
_PARAMS = {"q": "q", "k": "k", "v": "v", "out": "o"}
_ENCODERS: dict[str, tuple[Tower, ...]] = {"text": ("text",), "vision": ("vision",), "both": TOWERS}
# Of twelve blocks; `all` is all there are.
_POSITIONS = {
    "top": range(11, 12),
    "top1": range(11, 12),
    "top2": range(10, 12),
    "top3": range(9, 12),
    "bottom": range(4),
    "mid": range(4, 8),
    "up": range(8, 12),
    "half-up": range(6, 12),
    "half-bottom": range(6),
}
# Of ViT-L/14's 24 vision blocks. Until September 2024 they were those above, and `all` were the first 21.
_POSITIONS_24 = {"half-up": range(12, 24), "half-bottom": range(12)}
_WRITTEN = ("bottom", "mid", "up", "half-up", "half-bottom")  # those that every ViT-B has for both towers
_TEXT_DEPTH = 12
_VISION_DEPTH = {768: 12, 1024: 24}  # by width
_VISION_COUNTS = (12, 21, 24)
_Layer = dict[str, tuple[Tensor, Tensor]]
_Pair = dict[str, Any]


@dataclass(frozen=True)
class _Metadata:
    r: Rank
    alpha: Finite
    encoder: str
    position: str
    dropout_rate: Finite = 0.0


@dataclass(frozen=True)
class _File:
    weights: dict[str, dict[str, _Pair]]
    metadata: _Metadata
    clipgraft: Extras | None = None


def read_clip_lora(
    data: Mapping[str, Any], path: Path, text_layers: int | None = None, vision_layers: int | None = None
) -> AdapterFile:
    """Read a file that CLIP-LoRA's `save_lora` wrote.

    Args:
        data: what `read_checkpoint` made of the file.
        path: the `.pt` file.
        text_layers: blocks of the text tower, where the file leaves it open (12 in every CLIP of OpenAI).
        vision_layers: blocks of the vision tower.

    Raises:
        AdapterError: the file is damaged, or does not tell which layers belong to which tower.
    """
    file = as_record(data, _File, path)
    layers = _layers(file.weights, path)
    blocks = _layout(layers, file.metadata, path, {"text": text_layers, "vision": vision_layers})
    weights = {
        Site(tower, block, role): pair
        for (tower, block), layer in zip(blocks, layers, strict=True)
        for role, pair in layer.items()
    }
    if not weights:
        raise AdapterError(f"{path} holds no LoRA weights: it is no adapter; check the path")
    r, alpha, dropout = file.metadata.r, file.metadata.alpha, file.metadata.dropout_rate
    settings = lora_config(path, r, alpha, dict.fromkeys(weights, r), {}, dropout=dropout, use_rslora=True)
    odd = [str(site) for site, (a, _) in weights.items() if a.shape[0] != settings.r]
    if odd:
        raise AdapterError(f"{path}: {some(odd)} have another rank than the {settings.r} of its metadata")
    base = {"name": "", "pretrained": "", "family": "open_clip"}
    return with_extras(AdapterFile(path, parts_of(weights), settings, base=base), file.clipgraft)


def _layers(weights: Mapping[str, Mapping[str, _Pair]], path: Path) -> list[_Layer]:
    names = [f"layer_{index}" for index in range(len(weights))]
    strange = [repr(name) for name in weights if name not in set(names)]
    if strange or not names:
        raise AdapterError(
            f"{path}: its weights are {some(strange) or 'empty'} where layer_0, layer_1, … belong: "
            "save it again"
        )
    return [_layer(weights[name], name, path) for name in names]


def _layer(weights: Mapping[str, _Pair], name: str, path: Path) -> _Layer:
    halves: dict[str, dict[str, Tensor]] = {}
    for module, pair in weights.items():
        if module not in _ROLES:
            raise AdapterError(
                f"{path}: {name} holds {module!r}, which CLIP-LoRA has not: {', '.join(_ROLES)}; drop it"
            )
        surplus = [repr(key) for key in pair if key not in ("w_lora_A", "w_lora_B")]
        if surplus:
            raise AdapterError(f"{path}: {name}.{module} holds {some(surplus)} beside w_lora_A and w_lora_B")
        halves[_ROLES[module]] = {
            key[-1]: as_weight(v, f"{name}.{module}.{key}", path) for key, v in pair.items()
        }
    if not halves:
        return {}
    layer: _Layer = paired({f"{name}.{role}": half for role, half in halves.items()}, path)
    widths = {a.shape[1] for a, _ in layer.values()} | {b.shape[0] for _, b in layer.values()}
    if len(widths) > 1:
        raise AdapterError(
            f"{path}: the weights of {name} have several widths, {sorted(widths)}: save it again"
        )
    return {role.rpartition(".")[2]: pair for role, pair in layer.items()}


def _layout(
    layers: Sequence[_Layer], metadata: _Metadata, path: Path, depths: Mapping[Tower, int | None]
) -> list[tuple[Tower, int]]:
    """Tower and block of every layer; raises AdapterError where they cannot be told or do not fit."""
    encoder, position = metadata.encoder, metadata.position
    if encoder not in _ENCODERS or position not in ("all", *_POSITIONS):
        raise AdapterError(
            f"{path}: encoder {encoder[:60]!r}, position {position[:60]!r}: known are {', '.join(_ENCODERS)} "
            f"and all, {', '.join(_POSITIONS)}; save it with CLIP-LoRA again"
        )
    towers, count = _ENCODERS[encoder], len(layers)
    blocks: list[tuple[Tower, int]]
    if position == "all":
        texts = {("text",): count, ("vision",): 0}
        first = texts[towers] if towers in texts else _text_layers(layers, path, depths)
        blocks = [("text", b) for b in range(first)] + [("vision", b) for b in range(count - first)]
    else:
        blocks = _named_blocks(position, towers, depths, count)
    if len(blocks) != count or not all(_fits(tower, blocks, layers, depths) for tower in towers):
        raise AdapterError(
            f"{path}: its {count} layers are not those of position {position!r} in encoder {encoder!r}: "
            "pass `text_layers` and `vision_layers`, the blocks of each tower of its base"
        )
    return blocks


def _named_blocks(
    position: str, towers: Sequence[Tower], depths: Mapping[Tower, int | None], count: int
) -> list[tuple[Tower, int]]:
    """The blocks of a named position; of its two meanings for vision towers the one of `count` layers."""
    tables = [_POSITIONS, {**_POSITIONS, **_POSITIONS_24}]
    meanings = [
        [
            (tower, block)
            for tower in towers
            for block in (table if tower == "vision" else _POSITIONS)[position]
            if block < (depths[tower] or block + 1)
        ]
        for table in tables
    ]
    return next((blocks for blocks in meanings if len(blocks) == count), meanings[0])


def _fits(
    tower: Tower,
    blocks: Sequence[tuple[Tower, int]],
    layers: Sequence[_Layer],
    depths: Mapping[Tower, int | None],
) -> bool:
    """Whether the blocks of a tower exist in it, and their layers are of one width."""
    mine = [(block, layer) for (t, block), layer in zip(blocks, layers, strict=True) if t == tower]
    depth = depths[tower]
    exist = depth is None or all(block < depth for block, _ in mine)
    return exist and len(set(_widths([layer for _, layer in mine]))) < 2


def _text_layers(layers: Sequence[_Layer], path: Path, depths: Mapping[Tower, int | None]) -> int:
    """How many of the layers, at the beginning, are those of the text tower."""
    count = len(layers)
    if depths["text"] is not None:
        return min(depths["text"], count)
    if depths["vision"] is not None:
        return max(0, count - depths["vision"])
    known = [(index, _widths([layer])[0]) for index, layer in enumerate(layers) if layer]
    changes = [(i, j) for (i, one), (j, other) in pairwise(known) if one != other]
    if len(changes) == 1 and changes[0][1] == changes[0][0] + 1:
        return changes[0][1]
    if count - _TEXT_DEPTH in _VISION_COUNTS:
        return _TEXT_DEPTH
    raise AdapterError(
        f"{path} has {count} layers and does not tell how many are of the text tower: pass `text_layers=N`, "
        "the number of text blocks of its base"
    )


def _widths(layers: Sequence[_Layer]) -> list[int]:
    return [a.shape[1] for layer in layers for a, _ in layer.values()]


def write_clip_lora(
    adapter: AdapterFile,
    path: str | Path,
    text_layers: int | None = None,
    vision_layers: int | None = None,
) -> Path:
    """Write a file that CLIP-LoRA's `load_lora` takes with the same r, alpha, encoder, params and position.

    Its command line takes whole alphas: α/√r of the nearest one is the common scale, and what is left of each
    site's scale is in B (see `uniform`). Blocks that `position` covers and the adapter leaves alone have an
    empty layer, which `load_lora` passes over.

    Args:
        adapter: q, k, v and out of either tower, any ranks and scales.
        path: the `.pt` file.
        text_layers: blocks of the text tower; 12 if not given.
        vision_layers: blocks of the vision tower; if not given 12 at width 768, 24 at width 1024.

    Raises:
        AdapterError: the adapter has sites that the format or CLIP-LoRA cannot hold, or the file cannot be
            written.
    """
    depths = _depths(adapter, text_layers, vision_layers)
    _check_holds(adapter, depths)
    numbers = {tower: {s.block or 0 for s in adapter.weights if s.tower == tower} for tower in TOWERS}
    towers = [tower for tower in TOWERS if numbers[tower]]
    position, order = _position({tower: sorted(numbers[tower]) for tower in towers}, depths)
    update = uniform(adapter)
    root = math.sqrt(update.r)
    update = rescaled(update, max(1, round(update.scale * root)) / root)
    weights: dict[str, dict[str, dict[str, Tensor]]] = {}
    for index, (tower, block) in enumerate(order):
        layer = weights[f"layer_{index}"] = {}
        for module, role in _ROLES.items():
            if (pair := update.weights.get(Site(tower, block, role))) is not None:
                layer[module] = {"w_lora_A": pair[0], "w_lora_B": pair[1]}
    roles = {site.role for site in adapter.weights}
    metadata = {
        "r": update.r,
        "alpha": round(update.scale * root),
        "encoder": towers[0] if len(towers) == 1 else "both",
        "params": [letter for role, letter in _PARAMS.items() if role in roles],
        "position": position,
    }
    save_checkpoint({"weights": weights, "metadata": metadata, KEY: extras_of(adapter)}, Path(path))
    return Path(path)


def _check_holds(adapter: AdapterFile, depths: Mapping[Tower, int]) -> None:
    adapter.require_plain("a file of CLIP-LoRA")
    foreign = [
        str(site)
        for site in adapter.weights
        if site.role not in _PARAMS or site.block is None or site.block >= depths[site.tower]
    ]
    if foreign:
        raise AdapterError(
            f"{adapter.path}: CLIP-LoRA holds q, k, v and out of the first {depths['text']} text and "
            f"{depths['vision']} vision blocks, and not {some(foreign)}; write another format, or pass "
            "`text_layers` and `vision_layers` for a copy of CLIP-LoRA that adapts more"
        )


def _depths(adapter: AdapterFile, text_layers: int | None, vision_layers: int | None) -> dict[Tower, int]:
    vision = {site: a for site, (a, _) in adapter.weights.items() if site.tower == "vision"}
    width = max((a.shape[1] for site, a in vision.items() if site.role in _PARAMS), default=0)
    deepest = max((site.block or 0 for site in vision), default=0)
    default = _VISION_DEPTH.get(width, deepest + 1)
    return {
        "text": _TEXT_DEPTH if text_layers is None else text_layers,
        "vision": default if vision_layers is None else vision_layers,
    }


def _position(
    blocks: Mapping[Tower, list[int]], depths: Mapping[Tower, int]
) -> tuple[str, list[tuple[Tower, int]]]:
    """The smallest named position that covers the adapted blocks of each tower, and its layers in order."""
    covered = {name: {tower: _covered(name, tower, depths[tower]) for tower in blocks} for name in _WRITTEN}
    everything = {tower: list(range(depths[tower])) for tower in blocks}
    exact = (name for name in _WRITTEN if covered[name] == blocks)
    name = "all" if everything == blocks else next(exact, "all")
    chosen = everything if name == "all" else covered[name]
    return name, [(tower, block) for tower in TOWERS if tower in chosen for block in chosen[tower]]


def _covered(position: str, tower: Tower, depth: int) -> list[int]:
    table = _POSITIONS_24 if tower == "vision" and depth > 12 else _POSITIONS
    return [block for block in table.get(position, ()) if block < depth]
