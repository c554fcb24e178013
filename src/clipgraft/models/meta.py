"""Models without their weights: built on torch's meta device from a name or a configuration alone."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from clipgraft.errors import ModelError
from clipgraft.files import path_exists, write_json
from clipgraft.models.clip import Clip, Source, family_of
from clipgraft.models.configs import (
    CONFIG_FILE,
    HUB,
    check_known,
    check_text_tower,
    model_config,
    openclip_config,
    transformers_config,
)
from clipgraft.models.hub import fetch_reason, hf_failure, hub_access, one_line
from clipgraft.models.library_calls import quiet_libraries
from clipgraft.models.load import CHECKPOINT_SUFFIXES, EMOJI_BASE
from clipgraft.models.load_hf import check_path

Overrides = Mapping[str, object]
_PROJECTED = frozenset({"CLIPTextModelWithProjection", "CLIPVisionModelWithProjection"})


@dataclass(frozen=True)
class ModelConfig:
    """The configuration of a model.

    Attributes:
        name: what it was asked for by.
        library: whose it is.
        values: as in the library's own JSON, every setting written out for transformers.
    """

    name: str
    library: Literal["transformers", "open_clip"]
    values: dict[str, Any]


def clip_on_meta(name: str | Path, overrides: Overrides | None = None, pretrained: str | None = None) -> Clip:
    """A model on the meta device: its structure without weights, tokenizer and preprocessing.

    Args:
        name: what `load` takes, without the weights: `emoji`, an open_clip name (`ViT-B-32`) or JSON model
            config, `hf:` and a hub id or folder, `hf-hub:` and a hub id, a local folder of either library;
            or a transformers `config.json`.
        overrides: other values for settings of the configuration, `{"text_config.num_hidden_layers": 3}`
            in transformers, `{"text_cfg.layers": 3}` in open_clip.
        pretrained: an open_clip tag. Nothing is fetched: it decides on QuickGELU alone.

    Raises:
        ModelError: there is no such model or setting, or no model can be built from it.
    """
    return build_model(read_model_config(name, overrides, pretrained))


def read_model_config(
    name: str | Path, overrides: Overrides | None = None, pretrained: str | None = None
) -> ModelConfig:
    """The configuration of a model; arguments and errors as for `clip_on_meta`."""
    given = str(name)
    path = str(EMOJI_BASE) if given == "emoji" else given.removeprefix("hf:")
    if given.startswith("hf:"):
        check_path(path)
    if given.startswith("hf:") or given == "emoji" or _is_hf(Path(path)):
        found = _read_hf(path, given)
    else:
        found = ModelConfig(given, "open_clip", _openclip_values(given, pretrained or ""))
    return _overridden(found, overrides or {})


def build_model(config: ModelConfig, device: str | torch.device = "meta") -> Clip:
    """A model of this configuration, on the meta device without weights, on others with random ones.

    Raises:
        ModelError: no model can be built from it, or it is no CLIP.
    """
    build = _build_hf if config.library == "transformers" else _build_openclip
    try:
        with quiet_libraries():
            model = build(config, torch.device(device))
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"{config.name}: no model can be built from its configuration: {one_line(error)}; correct it"
        ) from error
    return Clip(model, family_of(model), source=Source(config.name)).eval()


def _is_hf(path: Path) -> bool:
    """Whether a folder or JSON file is of transformers."""
    if path.is_dir():
        return (path / "config.json").is_file() and not (path / CONFIG_FILE).is_file()
    if path.suffix != ".json" or not path.is_file():
        return False
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return False
    return isinstance(value, dict) and ("model_type" in value or "text_config" in value)


def _read_hf(path: str, name: str) -> ModelConfig:
    from transformers import PreTrainedConfig

    local = path_exists(path)
    with quiet_libraries(), hub_access(needed=not local) as offline:
        try:
            values, _ = PreTrainedConfig.get_config_dict(path)
            kept = {"architectures": values["architectures"]} if "architectures" in values else {}
            return ModelConfig(name, "transformers", {**_hf_config(values, name).to_dict(), **kept})
        except ModelError:
            raise
        except Exception as error:
            if local:
                raise ModelError(f"{path} cannot be read as a configuration: {one_line(error)}") from error
            raise hf_failure(path, error, offline) from error


def _hf_config(values: Mapping[str, Any], name: str) -> Any:
    """A transformers configuration object, without what decides on code; CLIP's where no type is said."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = values.get("model_type", "clip")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ModelError(f"{name}: transformers has no model of type {str(kind)[:60]!r}: correct model_type")
    return transformers_config(CONFIG_MAPPING[kind], values, name)


def _build_hf(config: ModelConfig, device: torch.device) -> nn.Module:
    # Early releases of transformers 5 make tensors as they are imported: none may be a meta tensor.
    import transformers
    from transformers import AutoModel, GenerationMixin  # noqa: F401

    values = _hf_config(config.values, config.name)
    # A tower alone has one configuration with and without projection.
    projected = next(iter(_PROJECTED & set(config.values.get("architectures") or ())), None)
    with device:
        if projected is None:
            model = AutoModel.from_config(values, trust_remote_code=False)
        else:
            model = getattr(transformers, projected)(values)
    assert isinstance(model, nn.Module)
    return model


def _build_openclip(config: ModelConfig, device: torch.device) -> nn.Module:
    import open_clip

    values = openclip_config(config.values, config.name)
    check_text_tower(values, config.name)
    borrowed = values.get("text_cfg", {}).get("hf_model_name")
    with hub_access(bool(borrowed)) as offline, tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / CONFIG_FILE, {"model_cfg": values, "preprocess_cfg": {}})
        try:
            with device:
                model = open_clip.create_model(
                    f"local-dir:{folder}", device=device, load_weights=False, pretrained_text=False
                )
        except Exception as error:  # each release of open_clip has its own
            if not borrowed or path_exists(borrowed):
                raise
            raise ModelError(
                f"{config.name} reads texts with {borrowed}, whose configuration cannot be fetched: "
                f"{fetch_reason(error, offline)}, or name a local folder of it in text_cfg.hf_model_name of "
                "a JSON model config"
            ) from error
    assert isinstance(model, nn.Module)
    return model


def _openclip_values(name: str, pretrained: str) -> dict[str, Any]:
    import open_clip

    path = Path(name)
    if path.suffix in CHECKPOINT_SUFFIXES:
        raise ModelError(
            f"'{name}' is a checkpoint and does not say which architecture it is for: give the model's name"
        )
    if not (path.suffix == ".json" or path.is_dir() or name.startswith(HUB)):
        check_known(name)
    values = model_config(name)
    tag = open_clip.get_pretrained_cfg(name.replace("/", "-"), pretrained) if pretrained else {}
    return {**values, "quick_gelu": True} if tag.get("quick_gelu") else values


def _overridden(config: ModelConfig, overrides: Overrides) -> ModelConfig:
    """The configuration with other values; raises ModelError for settings that it has not."""
    values = copy.deepcopy(config.values)
    known = _settings(config)
    for key, value in overrides.items():
        if key not in known:
            raise ModelError(f"{config.name} has no setting '{key}'{_near(key, known)}")
        *path, leaf = key.split(".")
        inner = values
        for part in path:
            inner = inner.setdefault(part, {})
        inner[leaf] = value
    return dataclasses.replace(config, values=values)


def _near(key: str, known: Mapping[str, object]) -> str:
    """Settings that may have been meant: with the same letters, or of the same part."""
    part, _, leaf = key.rpartition(".")
    parts = sorted({name.rpartition(".")[0] for name in known})
    part = next(iter(difflib.get_close_matches(part, parts, n=1)), part)
    beside = [name for name in known if name.rpartition(".")[0] == part] or list(known)
    leaves = {name.rpartition(".")[2]: name for name in beside}
    close = [name for other, name in leaves.items() if leaf and leaf in other]
    close += [leaves[other] for other in difflib.get_close_matches(leaf, leaves, n=3)]
    if close:
        return f" (did you mean {' or '.join(dict.fromkeys(close[:3]))}?)"
    return f"; there are {', '.join(beside[:12])}{', …' if len(beside) > 12 else ''}"


def _settings(config: ModelConfig) -> dict[str, object]:
    """Every setting by its dotted name; open_clip's JSON leaves most of them out."""
    known: dict[str, object] = {}
    if config.library == "open_clip":
        from open_clip.model import CLIPTextCfg, CLIPVisionCfg

        parts = {"text_cfg": CLIPTextCfg, "vision_cfg": CLIPVisionCfg}
        known = {
            f"{part}.{field.name}": None for part, cls in parts.items() for field in dataclasses.fields(cls)
        }
        known |= dict.fromkeys(("embed_dim", "quick_gelu", "init_logit_scale", "init_logit_bias"))
    for key, value in config.values.items():
        inner = value if isinstance(value, dict) else {}
        known |= {f"{key}.{name}": setting for name, setting in inner.items()} or {key: value}
    return known
