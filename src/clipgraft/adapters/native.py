"""Adapter folders: weights in PEFT's layout over transformers names, plus what clipgraft knows of them.

`adapter_model.safetensors` and `adapter_config.json` are what stock `PeftModel.from_pretrained` opens on the
`transformers.CLIPModel` with the same base weights, whichever family trained them. `clipgraft.json` adds the
spec, the base and its fingerprint, the temperature and the metrics, so that loading needs only the path.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from clipgraft.adapters.peft_layout import config_json, read_tensors, tensor_names
from clipgraft.errors import AdapterError
from clipgraft.files import atomic_path, write_json
from clipgraft.lora.inject import LoraSettings, attach, lora_state, remove_lora, require_lora
from clipgraft.models.clip import Clip, ClipLike, as_clip
from clipgraft.models.sites import Site

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
NATIVE_FILE = "clipgraft.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class AdapterFile:
    """A read adapter folder.

    Attributes:
        path: the folder.
        weights: A and B by site, in the shapes of `SiteRef.lora_shapes`.
        settings: what made them; ranks and alphas per site are exact.
        base: `name` and `pretrained` of the base, "" where a foreign file does not say.
        fingerprint: of the base, None for foreign files.
        logit_scale: the trained log temperature, None if it is not part of the adapter.
        metrics: what was measured when it was saved.
    """

    path: Path
    weights: dict[Site, tuple[Tensor, Tensor]]
    settings: LoraSettings
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
        path: the folder; made if needed, and files of an older adapter in it replaced one by one.
        metrics: numbers to keep with it.

    Returns:
        The folder.

    Raises:
        AdapterError: the model carries no LoRA, or the folder cannot be written.
    """
    clip, folder = as_clip(model), Path(path)
    state = require_lora(clip)
    tensors: dict[str, Tensor] = {}
    for site, layer in state.layers.items():
        for name, tensor in zip(tensor_names(site), (layer.lora_A, layer.lora_B), strict=True):
            tensors[name] = tensor.detach().to("cpu", torch.float32).contiguous()
    ranks = {site: layer.r for site, layer in state.layers.items()}
    alphas = {site: float(layer.alpha) for site, layer in state.layers.items()}
    try:
        with atomic_path(folder / WEIGHTS_FILE) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
            digest = _digest(temporary)
        write_json(folder / CONFIG_FILE, config_json(state.settings, ranks, alphas, clip.source.name))
        write_json(
            folder / NATIVE_FILE, _native_json(clip, state.settings, list(ranks), digest, metrics or {})
        )
    except OSError as error:
        raise AdapterError(f"cannot write adapter to {folder}: {error.strerror or error}") from error
    return folder


def _native_json(
    clip: Clip, settings: LoraSettings, sites: list[Site], digest: str, metrics: Mapping[str, Any]
) -> dict[str, Any]:
    trained_scale = clip.logit_scale.detach().float().item() if settings.train_logit_scale else None
    return {
        "format": FORMAT_VERSION,
        "base": {**asdict(clip.source), "family": clip.family.name, "fingerprint": clip.fingerprint},
        "sites": [str(site) for site in sites],
        "settings": asdict(settings),
        "logit_scale": trained_scale,
        "weights_sha256": digest,
        "metrics": dict(metrics),
    }


def read_adapter(path: str | Path) -> AdapterFile:
    """Read an adapter folder (or the folder of a run that holds one) without touching any model.

    Raises:
        AdapterError: no adapter there, or it is truncated, mixed from two saves, or foreign.
    """
    folder = _adapter_folder(Path(path))
    config = _read_json(folder / CONFIG_FILE)
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{folder / WEIGHTS_FILE} is truncated or damaged ({_brief(error)}): copy or save it again"
        ) from error
    weights, settings = read_tensors(tensors, config, folder)
    if not (folder / NATIVE_FILE).is_file():
        return AdapterFile(folder, weights, settings)
    native = _read_json(folder / NATIVE_FILE)
    if native.get("weights_sha256") != _digest(folder / WEIGHTS_FILE):
        raise AdapterError(
            f"{folder}: {WEIGHTS_FILE} is not the file {NATIVE_FILE} was written for: save it again"
        )
    try:
        recorded = LoraSettings(**native["settings"])
        base = {key: str(native["base"].get(key, "")) for key in ("name", "pretrained", "family")}
        fingerprint = str(native["base"]["fingerprint"])
    except (KeyError, TypeError, AttributeError) as error:
        raise AdapterError(
            f"{folder / NATIVE_FILE} is not in the layout this version reads ({_brief(error)}): "
            "update clipgraft or save the adapter again"
        ) from error
    settings = replace(settings, targets=recorded.targets, train_logit_scale=recorded.train_logit_scale)
    return AdapterFile(
        folder,
        weights,
        settings,
        base,
        fingerprint,
        native.get("logit_scale"),
        dict(native.get("metrics") or {}),
    )


def load_adapter(model: ClipLike, path: str | Path, *, force: bool = False) -> AdapterFile:
    """Attach a saved adapter to its base, replacing what the model carries.

    Args:
        model: a `Clip`, or a raw model of either family.
        path: the adapter folder.
        force: load although the base is another one.

    Raises:
        AdapterError: the file cannot be read, or was made for another base or another architecture.
    """
    clip, adapter = as_clip(model), read_adapter(path)
    _check_base(clip, adapter, force)
    if lora_state(clip) is not None:
        remove_lora(clip)
    sites = {str(site): site for site in adapter.weights}
    exact = replace(adapter.settings, targets=",".join(sites))
    layers = attach(clip, exact)
    for site, (a, b) in adapter.weights.items():
        layers[site].lora_A.data.copy_(a)
        layers[site].lora_B.data.copy_(b)
    require_lora(clip).settings = adapter.settings
    if adapter.logit_scale is not None:
        clip.logit_scale.data.fill_(adapter.logit_scale)
    return adapter


def _check_base(clip: Clip, adapter: AdapterFile, force: bool) -> None:
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
    if adapter.fingerprint is not None and adapter.fingerprint != clip.fingerprint and not force:
        name = " / ".join(part for part in (adapter.base["name"], adapter.base["pretrained"]) if part)
        raise AdapterError(
            f"{adapter.path} was made for base {name or 'unnamed'} with fingerprint {adapter.fingerprint}, but "
            f"this model's is {clip.fingerprint}: load that base, or pass --force (force=True) all the same"
        )


def _adapter_folder(path: Path) -> Path:
    if path.is_file() and path.name in (WEIGHTS_FILE, CONFIG_FILE, NATIVE_FILE):
        path = path.parent
    for folder in (path, path / "adapter"):
        if (folder / CONFIG_FILE).is_file() and (folder / WEIGHTS_FILE).is_file():
            return folder
    if not path.exists():
        raise AdapterError(f"no adapter at {path}: there is no such folder")
    raise AdapterError(f"no adapter at {path}: it holds no {CONFIG_FILE} with {WEIGHTS_FILE}")


def is_adapter(path: str | Path) -> bool:
    """Whether a path is an adapter folder, or a run folder that holds one."""
    try:
        _adapter_folder(Path(path))
    except AdapterError:
        return False
    return True


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"{path} is not readable JSON ({_brief(error)}): copy or save the adapter again"
        ) from error
    if not isinstance(value, dict):
        raise AdapterError(f"{path} holds no JSON object: it is no adapter file")
    return value


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _brief(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
