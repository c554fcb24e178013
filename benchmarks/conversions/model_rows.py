"""Conversions of whole merged models, merging itself, sums of adapters, and mixed batches."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from torch import Tensor, nn

import clipgraft as cg
from benchmarks.conversions.world import (
    FAMILIES,
    Outcome,
    Row,
    Update,
    World,
    adapted,
    apply_trained,
    by_family,
    differences,
    explicit,
)
from clipgraft.lora.state import require_lora
from clipgraft.models.clip import as_clip
from clipgraft.models.export import write_model
from clipgraft.models.library_calls import quiet_libraries

_MERGED: dict[str, dict[str, Any]] = {
    "r=16, every site": {"targets": "all"},
    "DoRA and all biases, every site": {"targets": "all", "use_dora": True, "bias": "all"},
}
_MIXED: dict[str, dict[str, Any]] = {
    "r=16, attention and MLP": {"targets": "linear"},
    "DoRA, attention and MLP": {"targets": "linear", "use_dora": True},
    "embeddings": {"targets": "embedding,vision.patch_embedding"},
}
_SUM = {"one": 0.7, "two": -1.5}
_CUT = 16


def rows() -> list[Row]:
    made: list[Row] = []
    for source in FAMILIES:
        for form in ("checkpoint", "open_clip", "transformers"):
            if (source, form) != ("transformers", "checkpoint"):
                run = partial(_whole, source=source, form=form)
                made.append(Row("merged model -> its library", f"{source} -> {_FORM_NAMES[form]}", run))
    for index, tower in enumerate(("vision", "text")):
        run = partial(_onnx, tower=tower, index=index)
        made.append(Row("merged model -> its library", f"open_clip -> ONNX Runtime, {tower}.onnx", run))
    for name, options in _MERGED.items():
        run = partial(_merged, options=options)
        made += by_family("merged against unmerged, fp32", f"{name}; {{}}", run)
    for name, options in _MERGED.items():
        for what in ("merged against unmerged", "unmerged against fp32", "merged against fp32"):
            run = partial(_half, options=options, what=what)
            made.append(Row("merged against unmerged, bf16", f"{name}; open_clip, {what}", run))
    for dtype in (torch.float32, torch.bfloat16):
        name = f"bits that differ after five merges of three adapters, {str(dtype)[6:]}; {{}}"
        made += by_family("unmerge", name, partial(_unmerged, dtype=dtype))
    made += [
        Row("sum of adapters", "0.7 · one - 1.5 · two against the explicit sum; open_clip", _sum),
        Row("sum of adapters", "the same merged; open_clip", partial(_sum, merged=True)),
        Row("sum of adapters", f"cut to rank {_CUT}: error it tells against the true one", _cut),
    ]
    for name, options in _MIXED.items():
        run = partial(_mixed, options=options)
        made += by_family("rows of two adapters and the base against each alone", f"{name}; {{}}", run)
    return made


_FORM_NAMES = {
    "checkpoint": "open_clip checkpoint",
    "open_clip": "open_clip folder",
    "transformers": "transformers folder",
}


def for_good(clip: cg.Clip) -> cg.Clip:
    """Merge the adapter into the weights of a clip for good."""
    cg.merge_lora(clip)
    cg.remove_lora(clip, keep_merged=True)
    return clip


def _whole(world: World, source: str, form: str) -> Outcome:
    clip = adapted(world, source, targets="all", train_logit_scale=True)
    wanted = world.run(clip.model)
    out = world.place() / ("merged.pt" if form == "checkpoint" else "merged")
    write_model(for_good(clip), out, "transformers" if form == "transformers" else "open_clip")
    return world.compare(world.run(_stock(world, out)), wanted)


def _stock(world: World, out: Path) -> nn.Module:
    """Load the files with the library itself."""
    import open_clip
    from transformers import CLIPModel

    if (out / "config.json").is_file():
        with quiet_libraries():
            found: nn.Module = CLIPModel.from_pretrained(out)
    elif out.is_dir():
        found = open_clip.create_model(f"local-dir:{out}")
    else:
        found = open_clip.create_model(world.arch, pretrained=str(out))
    return found.eval()


def _onnx(world: World, tower: str, index: int) -> Outcome:
    import onnxruntime

    clip = adapted(world, "open_clip", targets="all")
    wanted = world.run(clip.model)[index : index + 1]
    folder = world.folder / "onnx"
    if not folder.exists():
        write_model(for_good(clip), folder, "onnx")
    session = onnxruntime.InferenceSession(folder / f"{tower}.onnx")
    given = world.pixels if tower == "vision" else world.ids
    (got,) = session.run(None, {session.get_inputs()[0].name: given.numpy()})
    moved = differences(world.untouched[index : index + 1], wanted)[1]
    return Outcome(*differences([torch.from_numpy(got)], wanted), moved)


def _merged(world: World, family: str, options: dict[str, Any]) -> Outcome:
    clip = adapted(world, family, **options)
    wanted = world.run(clip.model)
    cg.merge_lora(clip)
    return world.compare(world.run(clip.model), wanted)


def _half(world: World, options: dict[str, Any], what: str) -> Outcome:
    """Build a bf16 base with an fp32 adapter; fp32 is the same base with its rounded weights."""
    folder = cg.save_adapter(adapted(world, "open_clip", **options), world.place())
    runs: dict[str, tuple[Tensor, ...]] = {}
    for name in what.split(" against "):
        clip = world.fresh("open_clip")
        clip.model.to(torch.bfloat16)
        clip.model.to(torch.float32 if name == "fp32" else torch.bfloat16)
        cg.load_adapter(clip, folder)
        if name == "merged":
            cg.merge_lora(clip)
        runs[name] = world.run(clip.model)
    got, wanted = runs.values()
    cosine = min(float(torch.cosine_similarity(g, w).min()) for g, w in zip(got, wanted, strict=True))
    found = world.compare(got, wanted)
    return Outcome(found.absolute, found.share, found.moved, f"cosine >= {cosine:.5f}")


def _bits(model: nn.Module) -> dict[str, Tensor]:
    """Return every weight under its transformers name, as bytes."""
    clip = as_clip(model)
    weights = clip.family.canonical_weights(clip.model)
    return {n: w.detach().contiguous().clone().view(-1).view(torch.uint8) for n, w in weights}


def _differing(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> int:
    """Count the bits that differ."""
    changed = [name for name, before in one.items() if not torch.equal(before, other[name])]
    return sum(int(np.unpackbits((one[n] ^ other[n]).numpy()).sum()) for n in changed)


def _unmerged(world: World, family: str, dtype: torch.dtype) -> Outcome:
    clip = world.fresh(family)
    clip.model.to(dtype)
    before = _bits(clip.model)
    variants: tuple[dict[str, Any], ...] = (
        {"targets": "all"},
        {"targets": "all", "use_dora": True},
        {"targets": "attention", "bias": "all"},
    )
    names = ("plain", "dora", "biases")
    for seed, (name, options) in enumerate(zip(names, variants, strict=True)):
        apply_trained(clip, seed, name=name, **options)
    merges: tuple[Any, ...] = (*names, {"plain": 0.5, "biases": -1.0}, list(names))
    for merge in merges:
        cg.merge_lora(clip, merge)
        cg.unmerge_lora(clip)
    differing = _differing(before, _bits(clip.model))
    total = 8 * sum(t.numel() for t in before.values())
    note = f"of {total:,} bits"
    if family == "transformers":
        note += f"; PEFT's own merge and unmerge, once, attention alone: {_peft_drift(world, dtype):,}"
    return Outcome(differing, differing / total, None, note)


def _peft_drift(world: World, dtype: torch.dtype) -> int:
    """Count the bits that differ after PEFT merged and unmerged one adapter."""
    folder = cg.save_adapter(adapted(world, "transformers", targets="attention"), world.place())
    base: Any = world.fresh("transformers").model.to(dtype)
    before = _bits(base)
    tuner: Any = peft.PeftModel.from_pretrained(base, str(folder)).base_model
    tuner.merge_adapter()
    tuner.unmerge_adapter()
    return _differing(before, _bits(tuner.unload()))


def _two(world: World) -> tuple[cg.Clip, dict[str, dict[str, Update]]]:
    """Put two adapters on one base; returns A, B and scale of each."""
    clip = world.fresh("open_clip")
    options: dict[str, dict[str, Any]] = {
        "one": {"targets": "linear-text,linear-vision", "alpha": 12},
        "two": {"targets": "attention", "r": 8, "alpha": 5, "use_rslora": True},
    }
    updates: dict[str, dict[str, Update]] = {}
    for seed, (name, given) in enumerate(options.items()):
        apply_trained(clip, seed, **given, name=name)
        scale = 12 / 16 if name == "one" else 5 / math.sqrt(8)
        state = cg.adapters.lora_state_dict(clip)
        sites = [key.removesuffix(".lora_A") for key in state if key.endswith(".lora_A")]
        updates[name] = {s: (state[f"{s}.lora_A"], state[f"{s}.lora_B"], scale) for s in sites}
    return clip, copy.deepcopy(updates)


def _sum(world: World, merged: bool = False) -> Outcome:
    clip, updates = _two(world)
    model = world.bases["open_clip"].model
    for name, weight in _SUM.items():
        model = explicit(model, {s: (a, b, weight * scale) for s, (a, b, scale) in updates[name].items()})
    if merged:
        cg.merge_lora(clip, _SUM)
    else:
        cg.combine_adapters(clip, _SUM, "sum")
    return world.compare(world.run(clip.model), world.run(model))


def _cut(world: World) -> Outcome:
    """Compute the Frobenius error of a cut in fp64, from the weights."""
    clip, updates = _two(world)
    made = cg.combine_adapters(clip, _SUM, "small", rank=_CUT)
    layers: Mapping[Any, Any] = require_lora(clip).adapters["small"].layers
    lost = whole = 0.0
    for site, layer in layers.items():
        exact = torch.zeros(layer.lora_B.shape[0], layer.lora_A.shape[1], dtype=torch.float64)
        for name, weight in _SUM.items():
            if str(site) in updates[name]:
                a, b, scale = updates[name][str(site)]
                exact += weight * scale * (b.double() @ a.double())
        kept = layer.scaling * (layer.lora_B.detach().double() @ layer.lora_A.detach().double())
        lost, whole = lost + float((exact - kept).square().sum()), whole + float(exact.square().sum())
    true = math.sqrt(lost / whole)
    gap = abs(made.error - true)
    return Outcome(gap, gap / true, None, f"it tells {made.error:.6f} of the sum's norm")


def _mixed(world: World, family: str, options: dict[str, Any]) -> Outcome:
    clip = world.fresh(family)
    for seed, name in enumerate(("one", "two")):
        apply_trained(clip, seed, **options, name=name)
    names: list[str | None] = ["one", None, "two", "one"]
    cg.set_adapter(clip, None)
    got = clip.encode_image(world.pixels, adapters=names), clip.encode_text(world.ids, adapters=names)
    alone = []
    for row, chosen in enumerate(names):
        cg.set_adapter(clip, chosen)
        only = replace(world, pixels=world.pixels[row : row + 1], ids=world.ids[row : row + 1])
        alone.append(only.run(clip.model))
    wanted = [torch.cat(tower) for tower in zip(*alone, strict=True)]
    return Outcome(*differences(got, wanted), differences(world.untouched, wanted)[1])
