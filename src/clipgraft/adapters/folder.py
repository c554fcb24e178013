"""Adapter folders: weights in PEFT's layout over transformers names, plus what clipgraft knows of them.

`adapter_model.safetensors` and `adapter_config.json` are what stock `PeftModel.from_pretrained` opens on the
`transformers.CLIPModel` with the same base weights, whichever family trained them. `clipgraft.json` adds the
spec, the base and its fingerprint, the temperature and the metrics, so that loading needs only the path, and
the digest of the weights it was written for. While a save is under way the new record lies beside the old
one, and the one that names the weights that are there is in force. So a save that is killed at any point
leaves the old adapter or the new one, never half of each.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from clipgraft.adapters.adapter_file import AdapterFile
from clipgraft.adapters.checkpoint import as_record, as_weight, some
from clipgraft.adapters.peft import (
    CONFIG_FILE,
    OWN_TYPE,
    config_json,
    foreign_to_peft,
    name_tensors,
    read_peft,
)
from clipgraft.errors import AdapterError, TargetError
from clipgraft.files import atomic_path, file_exists, write_json
from clipgraft.lora.config import LoraConfig
from clipgraft.lora.control import adapter_temperature
from clipgraft.lora.state import require_lora, require_unmerged
from clipgraft.lora.variants import variant_of
from clipgraft.models.clip import Clip, ClipLike, Source, as_clip
from clipgraft.models.family import site_bias
from clipgraft.models.names import CLIP, Twin, recorded_twin, site_path
from clipgraft.models.sites import Site
from clipgraft.models.weights_file import UnreadableError, check_is_weights, read_weights
from clipgraft.ours import refuse_foreign
from clipgraft.readers import placeholder, reason
from clipgraft.records import Finite, Flag, read_json
from clipgraft.writing import size_of, writing

log = logging.getLogger("clipgraft")
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"  # what PEFT wrote until 0.7
NATIVE_FILE = "clipgraft.json"
FILES = (WEIGHTS_FILE, PICKLED_FILE, CONFIG_FILE, NATIVE_FILE)
PENDING_FILE = ".clipgraft.json.next"
FORMAT_VERSION = 1


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
    logit_bias: Finite | None = None


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
    path = Path(path)
    refuse_other(path, overwrite)
    adapter = _described(as_clip(model), name, path, dict(metrics or {}))
    if foreign := foreign_to_peft(adapter):
        log.warning(
            "%s adapts %s, for which stock PEFT has no module: it refuses the folder, which clipgraft opens; "
            "leave them out of the targets for an adapter that PEFT opens too",
            path,
            some(map(str, foreign)),
        )
    return write_adapter(adapter, path)


def _described(clip: Clip, name: str | None, path: Path, metrics: dict[str, Any]) -> AdapterFile:
    """An adapter on a model as it is written to files: PiSSA as the update of rank 2r that it is."""
    state = require_lora(clip)
    adapter = state.chosen() if name is None else state.named(name)
    if adapter.norms or any(not layer.is_plain for layer in adapter.layers.values()):
        require_unmerged(clip, "save an adapter with DoRA or biases")
    refs, source, twin = clip.site_refs, findable(clip), clip.family.twin(clip.model)
    layers = {site: layer for site, layer in adapter.layers.items() if layer.r}
    parts = {
        site: {name: _as_stored(tensor) for name, tensor in layer.stored().items()}
        for site, layer in layers.items()
    }
    biases: dict[str, Tensor] = {}
    for site, layer in adapter.layers.items():
        bias = site_bias(clip.model, refs[site])
        if layer.lora_bias is not None and bias is not None:
            biases[site_path(site, twin)] = _as_stored(bias.float() + layer.lora_bias)
    norms = clip.family.norms(clip.model)
    biases |= {p: _as_stored(norms[p].bias.float() + module.lora_bias) for p, module in adapter.norms.items()}
    temperature = {part: float(value) for part, value in adapter_temperature(clip, name).items()}
    shared = variant_of(adapter.settings).stored_shared(adapter.shared, adapter.settings)
    return AdapterFile(
        path,
        parts,
        _exact(adapter.settings, parts, {site: layer.scaling for site, layer in layers.items()}),
        base={**asdict(source), "family": clip.family.name},
        fingerprint=clip.fingerprint,
        logit_scale=temperature.get("logit_scale"),
        logit_bias=temperature.get("logit_bias"),
        metrics=metrics,
        shared={name: _as_stored(tensor) for name, tensor in shared.items()},
        biases=biases,
        started_from=adapter.origin,
        twin=twin,
    )


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
    base = {"name": "", "pretrained": "", "family": "", **adapter.base}
    record = {
        "base": {**base, "fingerprint": adapter.fingerprint},
        "sites": [str(site) for site in adapter.parts],
        "settings": settings.record(),
        "logit_scale": adapter.logit_scale,
        **({} if adapter.logit_bias is None else {"logit_bias": adapter.logit_bias}),
        "metrics": adapter.metrics,
        **({"started_from": adapter.started_from} if adapter.started_from else {}),
    }
    _write_folder(path, name_tensors(adapter), config_json(adapter), record)
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
    if pretrained and file_exists(pretrained):
        pretrained = str(Path(pretrained).resolve())
    return Source(name, pretrained)


def read_adapter(path: str | Path, name: str | None = None) -> AdapterFile:
    """Read an adapter folder (or the folder of a run that holds one) without touching any model.

    `name` picks one where the folder holds several in subfolders, as PEFT saves named adapters.

    Raises:
        AdapterError: no adapter there, or it is truncated, mixed from two saves, or foreign.
    """
    return as_adapter(read_folder(Path(path), name))


def as_adapter(contents: Contents, twin: Twin = CLIP) -> AdapterFile:
    """`read_adapter` of a folder that has been read; `twin` has the names of the base at hand."""
    recorded = CLIP if contents.record is None else _recorded_twin(contents, contents.record)
    # Another release of transformers may call the same modules otherwise.
    known = twin if set(recorded.paths.values()) <= set(twin.paths.values()) else recorded
    adapter = read_peft(contents.tensors, contents.config, contents.folder, known)
    return adapter if contents.record is None else _with_record(adapter, contents.record)


def _recorded_twin(contents: Contents, record: Mapping[str, Any]) -> Twin:
    """The names of a base that goes by its own, as a file of clipgraft records them: sites beside paths."""
    auto, paths = contents.config.get("auto_mapping"), contents.config.get("target_modules")
    sites = record.get("sites")
    if not isinstance(sites, list) or not isinstance(paths, list) or not isinstance(auto, Mapping):
        return CLIP
    if len(sites) != len(paths) or not all(isinstance(item, str) for item in (*sites, *paths)):
        return CLIP
    try:
        named = {Site.parse(site): path for site, path in zip(sites, paths, strict=True)}
    except TargetError:
        return CLIP
    foreign = str(contents.config.get("peft_type")).startswith(OWN_TYPE)
    return recorded_twin(str(auto.get("base_model_class")), str(auto.get("parent_library")), named, foreign)


def _with_record(adapter: AdapterFile, values: Mapping[str, Any]) -> AdapterFile:
    record = as_record(values, _Record, adapter.path / NATIVE_FILE)
    base = record.base
    return replace(
        adapter,
        settings=adapter.settings.replace(
            targets=record.settings.targets, train_logit_scale=record.settings.train_logit_scale
        ),
        base={"name": base.name, "pretrained": base.pretrained, "family": base.family},
        fingerprint=base.fingerprint,
        logit_scale=record.logit_scale,
        logit_bias=record.logit_bias,
        metrics=record.metrics,
        started_from=record.started_from,
    )


@dataclass(frozen=True)
class Contents:
    """What an adapter folder holds.

    Attributes:
        folder: where.
        tensors: by their PEFT names.
        config: `adapter_config.json`.
        record: `clipgraft.json`; None in folders that PEFT wrote.
    """

    folder: Path
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    record: dict[str, Any] | None


def refuse_other(folder: Path, overwrite: bool = False) -> None:
    """Keep an adapter from being written into a folder with an adapter of PEFT's, or with anything else.

    Raises:
        AdapterError: the folder holds something, and no adapter of ours.
    """
    if folder.is_dir():
        refuse_foreign(folder, overwrite, AdapterError, ours=_bears_record)


def _bears_record(folder: Path) -> bool:
    # The record of a save comes before its weights, so that one which was killed has it too.
    for record in (folder / NATIVE_FILE, folder / PENDING_FILE):
        with contextlib.suppress(AdapterError, OSError):
            if record.is_file() and "weights_sha256" in _read_json(record):
                return True
    return False


def _write_folder(
    folder: Path, tensors: dict[str, Tensor], config: Mapping[str, Any], record: Mapping[str, Any]
) -> None:
    with atomic_path(folder / WEIGHTS_FILE, size_of(tensors)) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
        digest = {"format": FORMAT_VERSION, "weights_sha256": _digest(temporary)}
        write_json(folder / PENDING_FILE, {**digest, **record, "adapter_config": dict(config)})
    write_json(folder / CONFIG_FILE, dict(config))
    with writing(folder / NATIVE_FILE):
        (folder / PENDING_FILE).replace(folder / NATIVE_FILE)


def read_folder(path: Path, name: str | None = None) -> Contents:
    """Read an adapter folder, or that of a run which holds one; `name` picks one of several in subfolders.

    Raises:
        AdapterError: no adapter there, or its files are damaged or do not belong together.
    """
    folder = find_folder(path, name)
    tensors, digest = _read_weights(folder)
    records = [name for name in (NATIVE_FILE, PENDING_FILE) if (folder / name).is_file()]
    for name in records:
        record = _read_json(folder / name)
        if record.get("weights_sha256") == digest:
            config = _read_json(folder / CONFIG_FILE)
            if name == PENDING_FILE and isinstance(record.get("adapter_config"), dict):
                config = record["adapter_config"]
            if (version := record.get("format")) != FORMAT_VERSION:
                raise AdapterError(
                    f"{folder / name} has format {version!r}, this clipgraft reads {FORMAT_VERSION}: update "
                    "clipgraft, or save the adapter again"
                )
            return Contents(folder, tensors, config, record)
    if NATIVE_FILE in records:
        raise AdapterError(
            f"{folder}: {WEIGHTS_FILE} is not the file {NATIVE_FILE} was written for: copy all files of the "
            "adapter together, or save it again"
        )
    return Contents(folder, tensors, _read_json(folder / CONFIG_FILE), None)


def _read_weights(folder: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of an adapter and the digest of their file; PEFT takes safetensors first, as here."""
    weights = next(path for name in (WEIGHTS_FILE, PICKLED_FILE) if (path := folder / name).is_file())
    try:
        if weights.name == WEIGHTS_FILE:
            check_is_weights(weights)
            return load_file(weights), _digest(weights)
        state = read_weights(weights).state
        return {n: as_weight(t, n, weights, t.ndim) for n, t in state.items()}, _digest(weights)
    except UnreadableError as error:
        raise AdapterError(f"{weights} cannot be read: {error}") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(
            f"{weights} is truncated or damaged ({reason(error)}): copy or save it again"
        ) from error


def find_folder(path: Path, name: str | None = None) -> Path:
    """The adapter folder at a path, which may be one of its files, a run folder, or one of named adapters.

    PEFT saves an adapter that is not named `default` in a subfolder of that name.

    Raises:
        AdapterError: there is none, or several and none of that name.
    """
    if path.is_file() and path.name in FILES:
        path = path.parent
    for folder in (path, path / "adapter"):
        if _holds_adapter(folder):
            return folder
    named = sorted(folder for folder in path.glob("*/") if _holds_adapter(folder))
    chosen = [folder for folder in named if folder.name == name]
    if chosen or len(named) == 1:
        return (chosen or named)[0]
    if named:
        listed = ", ".join(folder.name for folder in named[:8])
        raise AdapterError(f"{path} holds several adapters, {listed}: give the folder of one, {named[0]}")
    if not path.exists():
        raise AdapterError(f"no adapter at {path}: there is no such folder; check the path")
    weights = next((name for name in (WEIGHTS_FILE, PICKLED_FILE) if (path / name).is_file()), None)
    if weights is not None:
        raise AdapterError(
            f"no adapter at {path}: {path} holds {weights} without {CONFIG_FILE}; an adapter is a folder "
            f"with {CONFIG_FILE} and its weights"
        )
    raise AdapterError(
        f"no adapter at {path}: an adapter is a folder with {CONFIG_FILE} and {WEIGHTS_FILE} in it"
    )


def is_adapter(path: str | Path) -> bool:
    """Whether a path is an adapter folder, or a run folder that holds one."""
    try:
        find_folder(Path(path))
    except AdapterError:
        return False
    return True


def _holds_adapter(folder: Path) -> bool:
    weights = (folder / WEIGHTS_FILE).is_file() or (folder / PICKLED_FILE).is_file()
    return weights and (folder / CONFIG_FILE).is_file()


def _read_json(path: Path) -> dict[str, Any]:
    if problem := placeholder(path):
        raise AdapterError(f"{path} cannot be read: {problem}")
    return read_json(path, dict[str, Any], AdapterError, "copy or save the adapter again")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
