"""Conversions between the two families, and to and from the `.pt` files of the guide and CLIP-LoRA."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import clipgraft as cg
from benchmarks.conversions.world import (
    FAMILIES,
    Outcome,
    Row,
    Update,
    World,
    adapted,
    by_family,
    differences,
    explicit,
    pair,
)
from clipgraft.adapters.convert import Form, write_any

_BETWEEN: dict[str, dict[str, Any]] = {
    "every site, trained temperature": {"targets": "all", "train_logit_scale": True},
    "DoRA and all biases, every site": {"targets": "all", "use_dora": True, "bias": "all"},
}
_PLAIN: dict[str, Any] = {"targets": "text-attention"}
_UNEVEN: dict[str, Any] = {
    "targets": "text-attention",
    "alpha": 12,
    "rank_pattern": {"text.0.*": 4},
    "alpha_pattern": {"*.*.v": 5.0},
}
_CLIP_LORA = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "proj"}
_R, _ALPHA = 16, 12


def rows() -> list[Row]:
    made: list[Row] = []
    for name, options in _BETWEEN.items():
        for source, target in (FAMILIES, FAMILIES[::-1]):
            run = partial(_between, source=source, target=target, options=options)
            made.append(Row("between families (logits)", f"{source} -> {target}: {name}", run))
    for form in ("guide", "guide-full"):
        for name, options in (("r=16", _PLAIN), ("several ranks and alphas", _UNEVEN)):
            run = partial(_to_guide, form=form, options=options)
            made.append(Row("guide's .pt", f"clipgraft -> {form}, {name}", run))
        run = partial(_from_guide, full=form == "guide-full")
        made += by_family("guide's .pt", f"{form} -> clipgraft; loaded on {{}}", run)
    for name, options in (("r=16", _PLAIN), ("several ranks and alphas", _UNEVEN)):
        run = partial(_to_clip_lora, options={**options, "targets": "attention"})
        made.append(Row("CLIP-LoRA's .pt", f"clipgraft -> CLIP-LoRA, {name}", run))
    return made + by_family("CLIP-LoRA's .pt", "CLIP-LoRA -> clipgraft; loaded on {}", _from_clip_lora)


def _logits(world: World, clip: cg.Clip) -> Tensor:
    """Compute (N, N) logits of images and texts, temperature included."""
    image, text = (F.normalize(t, dim=-1) for t in world.run(clip.model))
    return clip.logit_scale.detach().exp() * image @ text.T


def _between(world: World, source: str, target: str, options: dict[str, Any]) -> Outcome:
    clip = adapted(world, source, **options)
    other = world.fresh(target)
    cg.load_adapter(other, cg.save_adapter(clip, world.place()))
    wanted = _logits(world, clip)
    absolute, share = differences([_logits(world, other)], [wanted])
    return Outcome(absolute, share, differences([_logits(world, world.bases[target])], [wanted])[1])


def write_as(world: World, clip: cg.Clip, form: Form, out: Path) -> Path:
    """Write the adapter of a clip in another format."""
    return write_any(
        cg.read_adapter(cg.save_adapter(clip, world.place())),
        out,
        form,
        base_state_dict=world.bases["open_clip"].model.state_dict(),
        text_layers=world.depth("text"),
        vision_layers=world.depth("vision"),
    )


def _to_guide(world: World, form: Form, options: dict[str, Any]) -> Outcome:
    clip = adapted(world, "open_clip", **options)
    data = torch.load(write_as(world, clip, form, world.place() / "epoch.pt"), weights_only=True)
    state, config = data["lora_state_dict" if form == "guide" else "state_dict"], data["lora_config"]
    base = world.fresh("open_clip").model
    if form == "guide-full":
        base.load_state_dict({name: w for name, w in state.items() if "lora_" not in name})
    updates: dict[str, Update] = {}
    for name in (name for name in state if name.endswith(".lora_A")):
        _, _, block, layer, _ = name.split(".")
        a, b = state[name], state[f"{name[:-1]}B"]
        updates[f"text.{block}.{layer.removeprefix('lora_')}"] = (a, b, config["alpha"] / config["r"])
    return world.compare(world.run(explicit(base, updates)), world.run(clip.model))


def _from_guide(world: World, family: str, full: bool) -> Outcome:
    updates = _random_updates(world, ("text",), _ALPHA / _R)
    state: dict[str, Tensor] = dict(world.bases["open_clip"].model.state_dict()) if full else {}
    for site, (a, b, _) in updates.items():
        _, block, role = site.split(".")
        stem = f"transformer.resblocks.{block}.lora_{role}"
        state |= {f"{stem}.lora_A": a, f"{stem}.lora_B": b}
    config = {"model": world.arch, "pretrained": "none", "r": _R, "alpha": _ALPHA, "dropout": 0.1}
    path = world.place() / "epoch.pt"
    torch.save({"epoch": 1, "state_dict" if full else "lora_state_dict": state, "lora_config": config}, path)
    return _loaded(world, family, path, updates)


def _to_clip_lora(world: World, options: dict[str, Any]) -> Outcome:
    clip = adapted(world, "open_clip", **options)
    path = write_as(world, clip, "clip-lora", world.place() / "lora.pt")
    data = torch.load(path, weights_only=True)
    scale = data["metadata"]["alpha"] / math.sqrt(data["metadata"]["r"])
    updates: dict[str, Update] = {}
    for index, (tower, block) in enumerate(_clip_lora_layers(world)):
        layer = data["weights"][f"layer_{index}"]
        for role, module in _CLIP_LORA.items():
            updates[f"{tower}.{block}.{role}"] = (
                layer[module]["w_lora_A"],
                layer[module]["w_lora_B"],
                scale,
            )
    model = explicit(world.bases["open_clip"].model, updates)
    return world.compare(world.run(model), world.run(clip.model))


def _from_clip_lora(world: World, family: str) -> Outcome:
    updates = _random_updates(world, ("text", "vision"), _ALPHA / math.sqrt(_R))
    weights = {
        f"layer_{index}": {
            module: dict(zip(("w_lora_A", "w_lora_B"), updates[f"{tower}.{block}.{role}"][:2], strict=True))
            for role, module in _CLIP_LORA.items()
        }
        for index, (tower, block) in enumerate(_clip_lora_layers(world))
    }
    metadata = {"r": _R, "alpha": _ALPHA, "encoder": "both", "params": ["q", "k", "v", "o"]}
    path = world.place() / "lora.pt"
    torch.save({"weights": weights, "metadata": {**metadata, "position": "all"}}, path)
    return _loaded(world, family, path, updates)


def _clip_lora_layers(world: World) -> list[tuple[str, int]]:
    """Number attention modules as CLIP-LoRA does, text tower first."""
    return [(tower, block) for tower in ("text", "vision") for block in range(world.depth(tower))]


def _random_updates(world: World, towers: tuple[str, ...], scale: float) -> dict[str, Update]:
    generator = torch.Generator().manual_seed(1)
    updates: dict[str, Update] = {}
    for site, ref in world.bases["open_clip"].site_refs.items():
        if site.tower in towers and site.role in _CLIP_LORA:
            out, width = ref.shape
            updates[str(site)] = (*pair(width, out, _R, generator), scale)
    return updates


def _loaded(world: World, family: str, path: Path, updates: Mapping[str, Update]) -> Outcome:
    clip = world.fresh(family)
    cg.load_adapter(clip, path)
    wanted = world.run(explicit(world.bases["open_clip"].model, updates))
    return world.compare(world.run(clip.model), wanted)
