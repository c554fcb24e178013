"""From an adapter file to a model that carries it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipgraft.adapters.adapter_file import AdapterFile, with_scale
from clipgraft.adapters.checkpoint import some
from clipgraft.adapters.convert import read_any
from clipgraft.adapters.peft import missing_sites, told_shapes
from clipgraft.adapters.peft_openclip import OutProj
from clipgraft.errors import AdapterError
from clipgraft.lora.config import LoraConfig
from clipgraft.lora.initialization import initialize_from_base
from clipgraft.lora.inject import build, hang
from clipgraft.lora.layers import outputs_of
from clipgraft.lora.state import DEFAULT, Adapter, check_name, require_unmerged
from clipgraft.lora.variants import PlainLora, check_variant, variant_of
from clipgraft.models.clip import Clip, ClipLike, as_clip
from clipgraft.models.family import site_bias, site_weight
from clipgraft.models.names import path_site, site_path
from clipgraft.models.rwlock import rwlock_of
from clipgraft.models.sites import Site, SiteRef


def load_adapter(
    model: ClipLike,
    path: str | Path,
    name: str = DEFAULT,
    *,
    activate: bool = True,
    force: bool = False,
    peft_out_proj: OutProj | None = None,
) -> AdapterFile:
    """Attach a saved adapter to its base, replacing the one of that name that the model carries.

    Others stay. It may be done while other threads encode with `Clip.encode_image` and `Clip.encode_text`.

    Args:
        model: a `Clip`, or a raw model of either family.
        path: an adapter folder of clipgraft or PEFT, or a `.pt` file of the guide or of CLIP-LoRA.
        name: what it is called on this model; also which one to take of a folder that holds several.
        activate: let it act from now on. Otherwise the active adapter stays what it is.
        force: load although the base is another one.
        peft_out_proj: for adapters that PEFT made on an open_clip model: take updates of attention's out_proj
            `as-run`, which is twice, or `as-meant` (`clipgraft.adapters.peft_openclip`).

    Raises:
        AdapterError: the file cannot be read, or was made for another base or another architecture. The model
            is as it was.
    """
    clip = as_clip(model)
    check_name(name)
    require_unmerged(clip, "load an adapter")
    adapter = read_for(clip, path, name, peft_out_proj=peft_out_proj)
    put_on(clip, adapter, name, activate=activate, force=force)
    return adapter


def put_on(
    clip: Clip, file: AdapterFile, name: str, *, activate: bool = True, force: bool = False
) -> Adapter:
    """Attach an adapter that was read, under a name; raises AdapterError as `load_adapter` does."""
    with rwlock_of(clip.model).preparing():
        adapter = detached(clip, file, force=force)
        hang(clip, adapter, name, activate=activate, replace=True)
        return adapter


def detached(clip: Clip, file: AdapterFile, *, force: bool = False) -> Adapter:
    """Build an adapter that was read for a base, without attaching it: the model is not changed.

    `clipgraft.engine.encoder.encode_mixed` computes with it, and `hang` attaches it.

    Raises:
        AdapterError: it was made for another base or another architecture, or adapters are merged.
    """
    with rwlock_of(clip.model).read():
        require_unmerged(clip, "read an adapter")
        file = in_terms_of(clip, file)
        check_base(clip, file, force)
        exact = file.settings.replace(targets=",".join(map(str, file.parts)))
        adapter = build(clip, exact, file.shared)
        _fill(clip, adapter, file)
        return adapter


def read_for(
    clip: Clip, path: str | Path, name: str | None = None, *, peft_out_proj: OutProj | None = None
) -> AdapterFile:
    """Read an adapter of any format in the terms of a base; raises AdapterError as `read_any` does."""
    return read_any(path, name, peft_out_proj=peft_out_proj, **reading_options(clip))


def reading_options(clip: Clip) -> dict[str, Any]:
    """What `read_any` has to know of a base."""
    layers = {site.tower: 1 + (site.block or 0) for site in clip.sites if site.block is not None}
    return {
        "text_layers": layers.get("text"),
        "vision_layers": layers.get("vision"),
        "twin": clip.family.twin(clip.model),
    }


def in_terms_of(clip: Clip, file: AdapterFile) -> AdapterFile:
    """The same adapter with whole weights, biases of B and PiSSA told by what this base has.

    A whole weight W' is the update of full rank W + 1·(W' - W)·I; what PiSSA took off the base stands beside
    A and B, which makes the rank 2r.

    Raises:
        AdapterError: the base lacks a site or bias, its shapes are others, or the file is incomplete for it.
    """
    refs, twin = clip.site_refs, clip.family.twin(clip.model)
    _check_sites(clip, file, refs)
    parts, settings, biases = dict(file.parts), file.settings, dict(file.biases)
    for site, whole in file.full.items():
        change = whole.float() - site_weight(clip.model, refs[site]).detach().cpu().float()
        a, b = _full_rank(change.flatten(1))
        if refs[site].kind == "conv":
            a, b = a.view(-1, *change.shape[1:]), b[:, :, None, None]
        parts[site] = {"lora_A": a, "lora_B": b}
        settings = with_scale(settings, site, a.shape[0], 1.0)
    if file.config.get("init_lora_weights") == "pissa":
        settings, parts = _with_starts(clip, file, settings, parts)
    scales = file.scales
    for site, offset in file.offsets.items():
        bias = site_bias(clip.model, refs[site])
        if bias is None:
            raise AdapterError(f"{file.path}: {site} has no bias on this base, but the adapter moves one")
        biases[site_path(site, twin)] = bias.detach().cpu().float() + scales[site] * offset
    return replace(file, parts=parts, settings=settings, biases=biases, offsets={}, full={})


def _with_starts(
    clip: Clip, file: AdapterFile, settings: LoraConfig, parts: dict[Site, dict[str, Tensor]]
) -> tuple[LoraConfig, dict[Site, dict[str, Tensor]]]:
    """PEFT's PiSSA: s·(B·A - B₀·A₀) beside a base that is as it was."""
    refs, scales, both = clip.site_refs, file.scales, dict(parts)
    for site, (a, b) in file.weights.items():
        layer = PlainLora(refs[site], a.shape[0], scales[site] * a.shape[0])
        initialize_from_base(layer, site_weight(clip.model, refs[site]).cpu())
        assert layer.lora_start_A is not None
        assert layer.lora_start_B is not None
        doubled = (torch.cat([a, layer.lora_start_A]), torch.cat([b, -layer.lora_start_B], dim=1))
        both[site] = {**parts[site], **dict(zip(("lora_A", "lora_B"), doubled, strict=True))}
        settings = with_scale(settings, site, 2 * a.shape[0], scales[site])
    return settings, both


def _full_rank(change: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) as B·A with an identity for the smaller side."""
    out, inner = change.shape
    return (torch.eye(inner), change) if inner <= out else (change, torch.eye(out))


def _fill(clip: Clip, adapter: Adapter, file: AdapterFile) -> None:
    """Give a new adapter a file's weights and settings."""
    adapter.settings, adapter.origin = file.settings, str(file.path.resolve())
    refs, norms, twin = clip.site_refs, clip.family.norms(clip.model), clip.family.twin(clip.model)
    with torch.no_grad():
        for site, parts in file.parts.items():
            adapter.layers[site].restore(parts, site_weight(clip.model, refs[site]))
        for path, whole in file.biases.items():
            place = None if path in adapter.norms else path_site(path, twin)
            own = adapter.norms[path].lora_bias if place is None else adapter.layers[place].lora_bias
            base = norms[path].bias if place is None else site_bias(clip.model, refs[place])
            assert own is not None
            assert base is not None
            own.copy_(whole.to(base.device).float() - base.float())
    if file.temperature:
        trained = clip.temperature
        adapter.temperature = {
            part: torch.full_like(trained[part].detach(), value) for part, value in file.temperature.items()
        }


def _check_sites(clip: Clip, file: AdapterFile, refs: dict[Site, SiteRef]) -> None:
    kind = variant_of(file.settings)
    check_variant(file.settings, [_required(refs, site, file) for site in file.parts])
    for site, parts in file.parts.items():
        wanted = kind.part_shapes(refs[site], file.ranks[site])
        if {name: tuple(tensor.shape) for name, tensor in parts.items()} != wanted:
            raise AdapterError(
                f"{file.path}: {site} has {told_shapes(parts)} where this model needs "
                f"{', '.join(map(str, wanted.values()))}; load the base it was made for"
            )
    if file.logit_bias is not None and clip.logit_bias is None:
        raise AdapterError(
            f"{file.path} has a trained `logit_bias`, and this model has none; load the base it was made for"
        )
    shapes: list[tuple[Site, Tensor, tuple[int, ...]]] = [
        (site, tensor, (outputs_of(_required(refs, site, file)),)) for site, tensor in file.offsets.items()
    ]
    shapes += [(site, tensor, _required(refs, site, file).shape) for site, tensor in file.full.items()]
    for site, tensor, shape in shapes:
        if tuple(tensor.shape) != shape:
            raise AdapterError(
                f"{file.path}: {site} has {tuple(tensor.shape)} where this model needs {shape}; load the "
                "base it was made for"
            )
    missing = missing_sites(file, refs, clip.family.twin(clip.model))
    if missing:
        raise AdapterError(
            f"{file.path} lacks {len(missing)} of its target sites, {some(missing)}: "
            "it is incomplete, or was made for a smaller base; copy it again, or load its own base"
        )
    if file.settings.bias != "none" and not file.offsets:
        _check_biases(clip, file, refs)


def _required(refs: dict[Site, SiteRef], site: Site, file: AdapterFile) -> SiteRef:
    if site not in refs:
        raise AdapterError(f"{file.path}: this model has no site {site}; load the base it was made for")
    return refs[site]


def _check_biases(clip: Clip, file: AdapterFile, refs: dict[Site, SiteRef]) -> None:
    """All biases that the configuration announces are there, and no others."""
    wanted = dict(_biases(clip, file, refs))
    lacking, surplus = set(wanted) - set(file.biases), set(file.biases) - set(wanted)
    if lacking:
        raise AdapterError(f"{file.path} lacks the biases of {some(sorted(lacking))}: save it again")
    if surplus:
        raise AdapterError(
            f"{file.path} has biases that this model has not, or that bias={file.settings.bias!r} does not "
            f"announce: {some(sorted(surplus))}; load the base it was made for"
        )
    for path, bias in file.biases.items():
        if bias.shape != wanted[path].shape:
            raise AdapterError(
                f"{file.path}: the bias of {path} is {tuple(bias.shape)} where this model needs "
                f"{tuple(wanted[path].shape)}; load the base it was made for"
            )


def _biases(clip: Clip, file: AdapterFile, refs: dict[Site, SiteRef]) -> Iterator[tuple[str, Tensor]]:
    everywhere, twin = file.settings.bias == "all", clip.family.twin(clip.model)
    for site, ref in refs.items():
        bias = site_bias(clip.model, ref)
        if bias is not None and (everywhere or site in file.parts):
            yield site_path(site, twin), bias
    for path, norm in clip.family.norms(clip.model).items():
        if everywhere and norm.bias is not None:
            yield path, norm.bias


def check_base(clip: Clip, file: AdapterFile, force: bool) -> None:
    """Raise AdapterError where an adapter was made for another base, unless `force`."""
    if force or file.fingerprint is None or file.fingerprint == clip.fingerprint:
        return
    name = " / ".join(part for part in (file.base["name"], file.base["pretrained"]) if part)
    raise AdapterError(
        f"{file.path} was made for base {name or 'unnamed'} with fingerprint {file.fingerprint}, but "
        f"this model's is {clip.fingerprint}: load that base, or pass `force=True` all the same"
    )
