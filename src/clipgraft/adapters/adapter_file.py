"""Adapter folders: weights in PEFT's layout over transformers names, plus what clipgraft knows of them.

`adapter_model.safetensors` and `adapter_config.json` are what stock `PeftModel.from_pretrained` opens on the
`transformers.CLIPModel` with the same base weights, whichever family trained them. `clipgraft.json` adds the
spec, the base and its fingerprint, the temperature and the metrics, so that loading needs only the path.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipgraft.adapters.checkpoint import as_record
from clipgraft.adapters.folder import NATIVE_FILE, Contents, read_folder, refuse_other, write_folder
from clipgraft.adapters.peft import Tensors, config_json, name_tensors, named_base, read_tensors, tower_prefix
from clipgraft.errors import AdapterError
from clipgraft.lora.config import LoraConfig
from clipgraft.lora.control import adapter_logit_scale
from clipgraft.lora.state import Adapter, require_lora, require_unmerged
from clipgraft.lora.variants import variant_of
from clipgraft.models.clip import Clip, ClipLike, Source, as_clip
from clipgraft.models.family import site_bias
from clipgraft.models.hf import site_path
from clipgraft.models.sites import Site
from clipgraft.records import Finite, Flag
from clipgraft.results import Result


@dataclass(frozen=True, repr=False)
class AdapterFile(Result):
    """An adapter apart from any model.

    Attributes:
        path: where it was read.
        parts: what its variant stores of each site (`LoraLayer.part_shapes`), fp32, by attribute name.
        settings: what made them; ranks and alphas per site are exact.
        shared: what its variant stores of all sites together, by name.
        config: `adapter_config.json`, as PEFT reads it.
        base: `name`, `pretrained` and `family` of the base; empty where a foreign file does not say.
        fingerprint: of the base, None for foreign files.
        logit_scale: the trained log temperature, None if it is not part of the adapter.
        metrics: what was measured when it was saved.
        biases: whole biases, (out,), by the path of their module in `transformers.CLIPModel`.
        offsets: (out,) by site, PEFT's biases of B, which the scale acts on.
        full: whole weights, (out, in), by site: what PEFT calls modules to save.
        path_prefix: what PEFT's module paths lacked of those of `CLIPModel` (`peft_layout.tower_prefix`).
        started_from: the adapter file that its training began with; empty for one that began anew.
    """

    _shows = ("path", "sites", "base", "fingerprint", "metrics")
    _hidden = frozenset({"parts", "shared", "biases", "offsets", "full"})

    path: Path
    parts: dict[Site, dict[str, Tensor]]
    settings: LoraConfig
    config: dict[str, Any] = field(default_factory=dict)
    base: dict[str, str] = field(default_factory=dict)
    fingerprint: str | None = None
    logit_scale: float | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    offsets: dict[Site, Tensor] = field(default_factory=dict)
    full: dict[Site, Tensor] = field(default_factory=dict)
    path_prefix: str = ""
    started_from: str = ""

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where it acts with an update of its variant."""
        return tuple(self.parts)

    @property
    def weights(self) -> dict[Site, tuple[Tensor, Tensor]]:
        """A and B by site, in the shapes of `SiteRef.lora_shapes`, of variants that store them."""
        return {
            site: (parts["lora_A"], parts["lora_B"])
            for site, parts in self.parts.items()
            if "lora_A" in parts and "lora_B" in parts
        }

    @property
    def ranks(self) -> dict[Site, int]:
        """The rank of every site."""
        kind = variant_of(self.settings)
        return {site: kind.rank_of(parts) or 0 for site, parts in self.parts.items()}

    @property
    def scales(self) -> dict[Site, float]:
        """The s of W + s·B·A by site."""
        return site_scales(self.ranks, self.settings)

    @property
    def needs_base(self) -> bool:
        """Whether only the base tells what the update is: whole weights, biases of B, and PEFT's PiSSA."""
        return bool(self.full or self.offsets or self.config.get("init_lora_weights") == "pissa")

    def require_plain(self, form: str) -> None:
        """Refuse to leave something out; raises AdapterError naming what a format cannot hold."""
        variant = variant_of(self.settings)
        parts: dict[str, object] = {
            variant.beyond_lora: variant.beyond_lora and self.parts,
            "biases": self.biases or self.offsets,
            "whole weights": self.full,
        }
        held = [name for name, values in parts.items() if values]
        if held:
            raise AdapterError(
                f"{self.path} has {' and '.join(held)}, which {form} cannot hold: "
                "write an adapter folder instead"
            )


def site_scale(settings: LoraConfig, site: Site, r: int) -> float:
    """The s of W + s·B·A of one site of rank `r`."""
    alpha = settings.alpha_pattern.get(str(site), settings.alpha)
    return variant_of(settings).scale_of(alpha, r, settings.use_rslora)


def site_scales(ranks: Mapping[Site, int], settings: LoraConfig) -> dict[Site, float]:
    """The scale of every site, by their ranks."""
    return {site: site_scale(settings, site, r) for site, r in ranks.items()}


def pairs(weights: Mapping[Site, tuple[Tensor, Tensor]]) -> dict[Site, dict[str, Tensor]]:
    """A and B by site as `AdapterFile.parts`."""
    return {site: {"lora_A": a, "lora_B": b} for site, (a, b) in weights.items()}


@dataclass(frozen=True)
class _Base:
    name: str
    pretrained: str
    family: str
    fingerprint: str | None


@dataclass(frozen=True)
class _Settings:
    targets: str
    train_logit_scale: Flag


@dataclass(frozen=True)
class _Record:
    """What is read of `clipgraft.json`; the rest is in PEFT's files."""

    base: _Base
    settings: _Settings
    logit_scale: Finite | None
    metrics: dict[str, Any]
    started_from: str = ""


def lora_state_dict(model: ClipLike, name: str | None = None) -> dict[str, Tensor]:
    """An adapter's weights by site name: `text.0.q.lora_A`, …; detached, on the model's device.

    Of the active adapter, or of the one that is named; with all that its variant trains.
    """
    state = require_lora(model)
    adapter = state.chosen() if name is None else state.named(name)
    modules = {**{str(site): layer for site, layer in adapter.layers.items()}, **adapter.norms}
    return {
        f"{place}.{part}": tensor.detach()
        for place, module in modules.items()
        for part, tensor in module.state_dict().items()
        if tensor.numel()
    }


def save_adapter(
    model: ClipLike,
    path: str | Path,
    metrics: Mapping[str, Any] | None = None,
    *,
    name: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write an adapter of a model as a folder.

    Args:
        model: a `Clip` or raw model that carries LoRA.
        path: the folder; made if needed. An older adapter in it stays readable until the new one is whole;
            a folder with anything else in it, an adapter that PEFT wrote among it, is left as it is.
        metrics: numbers to keep with it.
        name: which adapter, by default the active one.
        overwrite: write it into such a folder nevertheless; files of other names stay.

    Returns:
        The folder.

    Raises:
        AdapterError: the model carries no such adapter, or the folder holds other things.
        WriteError: the folder cannot be written.
    """
    refuse_other(Path(path), overwrite)
    clip = as_clip(model)
    state = require_lora(clip)
    adapter = state.chosen() if name is None else state.named(name)
    scale = adapter_logit_scale(clip, name)
    return write_adapter(describe(clip, adapter, Path(path), scale, dict(metrics or {})), Path(path))


def describe(
    clip: Clip, adapter: Adapter, path: Path, logit_scale: float | None, metrics: dict[str, Any]
) -> AdapterFile:
    """An adapter on a model as it is written to files: PiSSA as the update of rank 2r that it is."""
    if adapter.norms or any(not layer.is_plain for layer in adapter.layers.values()):
        require_unmerged(clip, "save an adapter with DoRA or biases")
    refs, source = clip.site_refs, findable(clip)
    layers = {site: layer for site, layer in adapter.layers.items() if layer.r}
    parts = {
        site: {name: _as_stored(tensor) for name, tensor in layer.stored().items()}
        for site, layer in layers.items()
    }
    biases: dict[str, Tensor] = {}
    for site, layer in adapter.layers.items():
        bias = site_bias(clip.model, refs[site])
        if layer.lora_bias is not None and bias is not None:
            biases[site_path(site)] = _as_stored(bias.float() + layer.lora_bias)
    norms = clip.family.norms(clip.model)
    biases |= {p: _as_stored(norms[p].bias.float() + module.lora_bias) for p, module in adapter.norms.items()}
    variant = variant_of(adapter.settings)
    return AdapterFile(
        path,
        parts,
        _exact(adapter.settings, parts, {site: layer.scaling for site, layer in layers.items()}),
        base={**asdict(source), "family": clip.family.name},
        fingerprint=clip.fingerprint,
        logit_scale=logit_scale,
        metrics=metrics,
        shared=_all_as_stored(variant.stored_shared(adapter.shared, adapter.settings)),
        biases=biases,
        started_from=adapter.origin,
    )


def _all_as_stored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: _as_stored(tensor) for name, tensor in tensors.items()}


def _as_stored(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32).contiguous().clone()


def _exact(
    settings: LoraConfig, parts: Mapping[Site, Mapping[str, Tensor]], scales: Mapping[Site, float]
) -> LoraConfig:
    """The settings with ranks and alphas as the weights have them, the most frequent ones as the default."""
    kind = variant_of(settings)
    ranks = {site: kind.rank_of(own) or 0 for site, own in parts.items()}
    # The scale is proportional to alpha.
    alphas = {site: scales[site] / kind.scale_of(1.0, r, settings.use_rslora) for site, r in ranks.items()}
    r, alpha = _usual(settings.r, ranks), _usual(settings.alpha, alphas)
    return settings.replace(
        r=r,
        alpha=alpha,
        init="default",
        rank_pattern={str(site): n for site, n in ranks.items() if n != r},
        alpha_pattern={
            str(site): a for site, a in alphas.items() if not math.isclose(a, alpha, rel_tol=1e-12)
        },
    )


def _usual(asked: Any, found: Mapping[Site, Any]) -> Any:
    """What was asked for, if any site has it; else what most sites have."""
    near = [value for value in found.values() if math.isclose(value, asked, rel_tol=1e-12)]
    return asked if near or not found else Counter(found.values()).most_common(1)[0][0]


def write_adapter(adapter: AdapterFile, path: Path) -> Path:
    """Write an adapter that is apart from any model as a folder; returns it.

    Raises:
        AdapterError: it has parts that only its base tells the meaning of, or the folder cannot be written.
    """
    if adapter.needs_base:
        raise AdapterError(
            f"{adapter.path} has whole weights, biases of B or PiSSA, which the base is needed for: name it "
            "as `model`, or load the adapter on it and save that"
        )
    settings = adapter.settings
    tensors = Tensors(dict(adapter.parts), dict(adapter.shared), biases=dict(adapter.biases))
    base = {"name": "", "pretrained": "", "family": "", **adapter.base}
    record = {
        "base": {**base, "fingerprint": adapter.fingerprint},
        "sites": [str(site) for site in adapter.parts],
        "settings": settings.record(),
        "logit_scale": adapter.logit_scale,
        "metrics": adapter.metrics,
        **({"started_from": adapter.started_from} if adapter.started_from else {}),
    }
    named = name_tensors(tensors, variant_of(settings))
    write_folder(path, named, config_json(settings, adapter.parts, base["name"]), record)
    return path


def findable(clip: Clip) -> Source:
    """Where the base is, so that it is found from any working directory: local paths are made absolute."""
    name, pretrained = clip.source.name, clip.source.pretrained
    hub = getattr(clip.model, "name_or_path", None)
    if not name and isinstance(hub, str) and hub:
        name = f"hf:{hub}"
    prefix = "hf:" if name.startswith("hf:") else ""
    path = Path(name.removeprefix(prefix))
    if name not in ("", "emoji") and path.exists():
        name = f"{prefix}{path.resolve()}"
    if pretrained and Path(pretrained).is_file():
        pretrained = str(Path(pretrained).resolve())
    return Source(name, pretrained)


def read_adapter(path: str | Path, name: str | None = None) -> AdapterFile:
    """Read an adapter folder (or the folder of a run that holds one) without touching any model.

    `name` picks one where the folder holds several in subfolders, as PEFT saves named adapters.

    Raises:
        AdapterError: no adapter there, or it is truncated, mixed from two saves, or foreign.
    """
    return as_adapter(read_folder(Path(path), name))


def as_adapter(contents: Contents) -> AdapterFile:
    """`read_adapter` of a folder that has been read."""
    prefix = tower_prefix(contents.tensors, contents.config, contents.folder)
    tensors, settings = read_tensors(contents.tensors, contents.config, contents.folder, prefix)
    adapter = AdapterFile(
        contents.folder,
        tensors.parts,
        settings,
        contents.config,
        shared=tensors.shared,
        biases=tensors.biases,
        offsets=tensors.offsets,
        full=tensors.full,
        path_prefix=prefix,
        base=named_base(contents.config, "transformers"),
    )
    return adapter if contents.record is None else _with_record(adapter, contents.folder, contents.record)


def _with_record(adapter: AdapterFile, folder: Path, values: Mapping[str, Any]) -> AdapterFile:
    record = as_record(values, _Record, folder / NATIVE_FILE)
    base = record.base
    return replace(
        adapter,
        settings=adapter.settings.replace(
            targets=record.settings.targets, train_logit_scale=record.settings.train_logit_scale
        ),
        base={"name": base.name, "pretrained": base.pretrained, "family": base.family},
        fingerprint=base.fingerprint,
        logit_scale=record.logit_scale,
        metrics=record.metrics,
        started_from=record.started_from,
    )
