"""Adapter folders: weights in PEFT's layout over transformers names, plus what clipgraft knows of them.

`adapter_model.safetensors` and `adapter_config.json` are what stock `PeftModel.from_pretrained` opens on the
`transformers.CLIPModel` with the same base weights, whichever family trained them. `clipgraft.json` adds the
spec, the base and its fingerprint, the temperature and the metrics, so that loading needs only the path.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipgraft.adapters.folder import NATIVE_FILE, Contents, read_folder, write_folder
from clipgraft.adapters.peft_layout import config_json, missing_sites, read_tensors, tensor_names
from clipgraft.errors import AdapterError, ConfigError
from clipgraft.lora.inject import (
    LoraSettings,
    adapter_logit_scale,
    attach,
    check_settings,
    lora_state,
    remove_lora,
    require_lora,
)
from clipgraft.models.clip import Clip, ClipLike, Source, as_clip
from clipgraft.models.sites import Site


@dataclass(frozen=True)
class AdapterFile:
    """A read adapter folder.

    Attributes:
        path: the folder.
        weights: A and B by site, in the shapes of `SiteRef.lora_shapes`.
        settings: what made them; ranks and alphas per site are exact.
        config: `adapter_config.json`, as PEFT reads it.
        base: `name`, `pretrained` and `family` of the base; empty where a foreign file does not say.
        fingerprint: of the base, None for foreign files.
        logit_scale: the trained log temperature, None if it is not part of the adapter.
        metrics: what was measured when it was saved.
    """

    path: Path
    weights: dict[Site, tuple[Tensor, Tensor]]
    settings: LoraSettings
    config: dict[str, Any] = field(default_factory=dict)
    base: dict[str, str] = field(default_factory=dict)
    fingerprint: str | None = None
    logit_scale: float | None = None
    metrics: dict[str, Any] = field(default_factory=dict)


def lora_state_dict(model: ClipLike) -> dict[str, Tensor]:
    """The adapter's weights by site name: `text.0.q.lora_A`, …; detached, on the model's device."""
    layers = require_lora(model).layers
    pairs = {f"{site}.lora_A": layer.lora_A.detach() for site, layer in layers.items()}
    return pairs | {f"{site}.lora_B": layer.lora_B.detach() for site, layer in layers.items()}


def save_adapter(model: ClipLike, path: str | Path, metrics: Mapping[str, Any] | None = None) -> Path:
    """Write the model's adapter as a folder.

    Args:
        model: a `Clip` or raw model that carries LoRA.
        path: the folder; made if needed. An older adapter in it stays readable until the new one is whole.
        metrics: numbers to keep with it.

    Returns:
        The folder.

    Raises:
        AdapterError: the model carries no LoRA, or the folder cannot be written.
    """
    clip, folder = as_clip(model), Path(path)
    state, source = require_lora(clip), _findable(clip)
    tensors: dict[str, Tensor] = {}
    for site, layer in state.layers.items():
        for name, tensor in zip(tensor_names(site), (layer.lora_A, layer.lora_B), strict=True):
            tensors[name] = tensor.detach().to("cpu", torch.float32).contiguous()
    ranks = {site: layer.r for site, layer in state.layers.items()}
    alphas = {site: float(layer.alpha) for site, layer in state.layers.items()}
    record = {
        "base": {**asdict(source), "family": clip.family.name, "fingerprint": clip.fingerprint},
        "sites": [str(site) for site in state.layers],
        "settings": asdict(state.settings),
        "logit_scale": adapter_logit_scale(clip),
        "metrics": dict(metrics or {}),
    }
    write_folder(folder, tensors, config_json(state.settings, ranks, alphas, source.name), record)
    return folder


def _findable(clip: Clip) -> Source:
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


def read_adapter(path: str | Path) -> AdapterFile:
    """Read an adapter folder (or the folder of a run that holds one) without touching any model.

    Raises:
        AdapterError: no adapter there, or it is truncated, mixed from two saves, or foreign.
    """
    contents = read_folder(Path(path))
    weights, settings = read_tensors(contents.tensors, contents.config, contents.folder)
    try:
        check_settings(settings, settings.rank_pattern.values(), settings.alpha_pattern.values())
    except ConfigError as error:
        raise AdapterError(f"{contents.folder}: {error}: save the adapter again") from error
    adapter = AdapterFile(contents.folder, weights, settings, contents.config)
    return adapter if contents.record is None else _with_record(adapter, contents, contents.record)


def _with_record(adapter: AdapterFile, contents: Contents, record: Mapping[str, Any]) -> AdapterFile:
    try:
        base, recorded, scale = record["base"], record["settings"], record["logit_scale"]
        return replace(
            adapter,
            settings=replace(
                adapter.settings,
                targets=str(recorded["targets"]),
                train_logit_scale=bool(recorded["train_logit_scale"]),
            ),
            base={key: str(base[key]) for key in ("name", "pretrained", "family")},
            fingerprint=str(base["fingerprint"]),
            logit_scale=None if scale is None else _finite(scale),
            metrics=dict(record["metrics"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterError(
            f"{contents.folder / NATIVE_FILE} is not in the layout this version reads "
            f"({type(error).__name__}: {error}): save the adapter again"
        ) from error


def _finite(value: float) -> float:
    if not math.isfinite(float(value)):
        raise ValueError(f"logit_scale is {value}")
    return float(value)


def load_adapter(model: ClipLike, path: str | Path, *, force: bool = False) -> AdapterFile:
    """Attach a saved adapter to its base, replacing what the model carries.

    Args:
        model: a `Clip`, or a raw model of either family.
        path: the adapter folder.
        force: load although the base is another one.

    Raises:
        AdapterError: the file cannot be read, or was made for another base or another architecture. The model
            is as it was.
    """
    clip, adapter = as_clip(model), read_adapter(path)
    _check_sites(clip, adapter)
    _check_base(clip, adapter, force)
    if lora_state(clip) is not None:
        remove_lora(clip)
    exact = replace(adapter.settings, targets=",".join(map(str, adapter.weights)))
    layers = attach(clip, exact)
    for site, (a, b) in adapter.weights.items():
        layers[site].lora_A.data.copy_(a)
        layers[site].lora_B.data.copy_(b)
    require_lora(clip).settings = adapter.settings
    if adapter.logit_scale is not None:
        clip.logit_scale.data.fill_(adapter.logit_scale)
    return adapter


def _check_sites(clip: Clip, adapter: AdapterFile) -> None:
    refs = clip.site_refs
    for site, (a, b) in adapter.weights.items():
        if site not in refs:
            raise AdapterError(
                f"{adapter.path}: this model has no site {site}; load the base it was made for"
            )
        wanted = refs[site].lora_shapes(a.shape[0])
        if (tuple(a.shape), tuple(b.shape)) != wanted:
            raise AdapterError(
                f"{adapter.path}: {site} has A {tuple(a.shape)}, B {tuple(b.shape)} where this model needs "
                f"{wanted[0]}, {wanted[1]}; load the base it was made for"
            )
    missing = missing_sites(adapter.config, adapter.weights, refs)
    if missing:
        raise AdapterError(
            f"{adapter.path} lacks {len(missing)} of its target sites, {', '.join(map(str, missing[:3]))}: "
            "it is incomplete, or was made for a smaller base; copy it again, or load its own base"
        )


def _check_base(clip: Clip, adapter: AdapterFile, force: bool) -> None:
    if force or adapter.fingerprint is None or adapter.fingerprint == clip.fingerprint:
        return
    name = " / ".join(part for part in (adapter.base["name"], adapter.base["pretrained"]) if part)
    raise AdapterError(
        f"{adapter.path} was made for base {name or 'unnamed'} with fingerprint {adapter.fingerprint}, but "
        f"this model's is {clip.fingerprint}: load that base, or pass --force (force=True) all the same"
    )
