"""Configurations of models, and what of them open_clip and transformers get: known settings, plain values.

A configuration comes with a stranger's model. Both libraries pass its entries on as keyword arguments, and
some of those run code or fetch it (`trust_remote_code`, `auto_map`, kernels of the hub, `hf-hub:` names of
timm). So every entry is looked up in a list first, and what is not on it is refused or left behind.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from clipgraft.errors import ModelError
from clipgraft.files import folder_exists
from clipgraft.models.hub import KNOWN_HUB_IDS, nearest, one_line
from clipgraft.readers import placeholder

CONFIG_FILE = "open_clip_config.json"
HUB = "hf-hub:"
_TOP = (
    "embed_dim",
    "quick_gelu",
    "custom_text",
    "init_logit_scale",
    "init_logit_bias",
    "nonscalar_logit_scale",
)
_TOWERS = ("vision_cfg", "text_cfg", "multimodal_cfg")
_INNER: Mapping[str, tuple[str, ...]] = {
    "act_kwargs": ("approximate",),
    "norm_kwargs": ("eps", "elementwise_affine", "bias"),
    "tokenizer_kwargs": ("clean", "strip_sep_token", "language"),
}
_PREPROCESS = ("size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color")
_OFF = (None, False)
_REMOTE = ("trust_remote_code", "auto_map", "custom_objects")
_LARGEST, _MOST_BLOCKS = 10**7, 1000
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Of every configuration class of transformers: what decides how a model is built, and runs nothing.
_SHARED = ("pad_token_id", "bos_token_id", "eos_token_id", "rope_theta")
_UNSAFE = re.compile(r"auto_map|trust_remote_code|_implementation|quantization_config|kernel|custom_", re.I)


def model_config(name: str) -> dict[str, Any]:
    """The `model_cfg` of a base that `load` loaded under this name.

    Raises:
        ModelError: there is none, or not any more.
    """
    import open_clip

    path = Path(name)
    config: dict[str, Any] | None = None
    if path.suffix == ".json":
        config = read_config(path)["model_cfg"]
    elif name and path.is_dir():
        config = read_config(path / CONFIG_FILE)["model_cfg"]
    elif name:
        try:
            config = open_clip.get_model_config(name if name.startswith(HUB) else name.replace("/", "-"))
        except Exception as error:
            raise config_failure(name, error) from error
        config = None if config is None else openclip_config(config, name)
    if config is None:
        raise ModelError(
            f"'{name}' has no known open_clip configuration: write a checkpoint (.pt), which needs none"
        )
    return config


def check_known(name: str) -> None:
    """Raise ModelError, with the nearest names, for a name that is not open_clip's."""
    import open_clip

    models = open_clip.list_models()
    if name.replace("/", "-") not in models:
        near = nearest(name, [*models, "emoji", *(f"hf:{hub_id}" for hub_id in KNOWN_HUB_IDS)])
        raise ModelError(
            f"no model '{name}': it is no open_clip name, local folder or JSON config{near}; "
            "transformers models are written hf:owner/name"
        )


def check_text_tower(settings: Mapping[str, Any], where: object) -> None:
    """Look at the configuration of a text tower of transformers before open_clip builds one from it.

    Raises:
        ModelError: open_clip does not know it, or it brings code along.
    """
    name = settings["text_cfg"].get("hf_model_name")
    if not name:
        return
    from open_clip.hf_configs import arch_dict
    from transformers import PreTrainedConfig

    values, _ = PreTrainedConfig.get_config_dict(name)
    told = f"{where}: text_cfg.hf_model_name {name}"
    kind = values.get("model_type")
    if kind not in arch_dict:
        raise ModelError(
            f"{told} is a text tower of type {kind!r}: open_clip builds {', '.join(arch_dict)}; the code of "
            "other models is never run"
        )
    for key, value in values.items():
        if re.search(r"_implementation|kernel", key) and value not in _OFF and "/" in str(value):
            raise ModelError(f"{told} says {key} {_shown(value)}, code of the hub, which is never run")


def read_config(path: Path) -> dict[str, Any]:
    """The parts `model_cfg` and `preprocess_cfg` of a JSON file, which may be the former alone."""
    if problem := placeholder(path):
        raise ModelError(f"model config {path} cannot be read: {problem}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"model config {path}: there is no such file") from error
    except (ValueError, OSError, RecursionError) as error:
        raise ModelError(f"model config {path} is not readable JSON: {one_line(error)}") from error
    whole = value if isinstance(value, dict) else {}
    model = whole.get("model_cfg", whole)
    towers = ("vision_cfg", "text_cfg")
    missing = [key for key in ("embed_dim", *towers) if not isinstance(model, dict) or key not in model]
    if missing:
        raise ModelError(
            f"model config {path} lacks {', '.join(missing)}: it must be an open_clip model config"
        )
    flat = [key for key in towers if not isinstance(model[key], dict)]
    if flat:
        raise ModelError(f"model config {path}: {' and '.join(flat)} must be an object of settings")
    return {
        "model_cfg": openclip_config(model, path),
        "preprocess_cfg": preprocess_config(whole.get("preprocess_cfg"), path),
    }


def config_failure(where: object, error: Exception) -> ModelError:
    """A configuration that open_clip cannot build a model from."""
    return ModelError(
        f"{where} cannot be built as an open_clip model: {one_line(error)}; correct it, or load by name"
    )


def borrows(config: Mapping[str, Any], tokenizer: bool = True) -> bool:
    """Whether a model's text tower, or its tokenizer, is one of transformers and comes from the hub."""
    text = config.get("text_cfg", {})
    return bool(text.get("hf_model_name") or (tokenizer and text.get("hf_tokenizer_name")))


def openclip_config(config: Mapping[str, Any], where: object) -> dict[str, Any]:
    """A copy of an open_clip `model_cfg` that holds nothing but known settings of plain values.

    Raises:
        ModelError: it holds something else; the message names the entry and the file.
    """
    from open_clip.coca_model import MultimodalCfg
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    known = dict(zip(_TOWERS, (CLIPVisionCfg, CLIPTextCfg, MultimodalCfg), strict=True))
    checked: dict[str, Any] = {}
    for key, value in config.items():
        if key in known:
            settings = [field.name for field in dataclasses.fields(known[key])]
            checked[key] = _tower(_mapping(value, key, where), key, settings, where)
        elif key in _TOP:
            checked[key] = _plain(value, key, where)
        elif value not in _OFF:
            raise _unknown(key, where, (*_TOP, *_TOWERS))
    vision, text = checked.get("vision_cfg", {}), checked.get("text_cfg", {})
    _check_timm(vision, where)
    for key in ("hf_model_name", "hf_tokenizer_name"):
        if text.get(key):
            _check_place(text[key], f"text_cfg.{key}", where)
    return checked


def preprocess_config(config: object, where: object) -> dict[str, Any]:
    """A copy of open_clip's `preprocess_cfg`; raises ModelError as `openclip_config` does.

    open_clip passes over entries that it does not know, so they are left out here too.
    """
    given = _mapping(config or {}, "preprocess_cfg", where)
    return {key: _plain(given[key], f"preprocess_cfg.{key}", where) for key in _PREPROCESS if key in given}


def transformers_config(kind: Any, values: Mapping[str, Any], where: object) -> Any:
    """A configuration of a class of transformers, of the entries that this class declares itself.

    The entries that it shares with all classes (`auto_map`, `_attn_implementation`, quantization, kernels of
    the hub) decide what code runs, and not what is computed: they are left behind.
    """
    return kind(**_declared(kind, values, where))


def _tower(given: Mapping[str, Any], tower: str, known: list[str], where: object) -> dict[str, Any]:
    checked: dict[str, Any] = {}
    for key, value in given.items():
        path = f"{tower}.{key}"
        if key in _INNER and key in known:
            inner = _mapping(value or {}, path, where)
            for name, part in inner.items():
                if name not in _INNER[key] and part not in _OFF:
                    raise _unknown(f"{path}.{name}", where, [f"{path}.{known}" for known in _INNER[key]])
            kept = {n: _option(v, f"{path}.{n}", where) for n, v in inner.items() if n in _INNER[key]}
            checked[key] = kept or None
        elif key in known:
            checked[key] = _plain(value, path, where)
        elif value not in _OFF:
            raise _unknown(path, where, [f"{tower}.{name}" for name in known])
    return {key: value for key, value in checked.items() if key not in _INNER or value is not None}


def _option(value: Any, key: str, where: object) -> Any:
    """A value of one of the inner lists, where libraries find a wrong one only in the forward pass."""
    kind = key.rpartition(".")[2]
    right = {"approximate": value in ("none", "tanh"), "eps": isinstance(value, float) and value > 0}
    if not right.get(kind, True):
        raise ModelError(f"{where}: {key} is {_shown(value)}, which is no such setting: correct it")
    return _plain(value, key, where)


def _check_timm(vision: dict[str, Any], where: object) -> None:
    name = vision.get("timm_model_name")
    if not name:
        return
    # Weights come from the checkpoint alone; timm's own would be fetched and overwritten.
    vision["timm_model_pretrained"] = False
    import timm

    # `hf-hub:` and `local-dir:` names make timm read a stranger's settings from elsewhere.
    if not isinstance(name, str) or not re.fullmatch(r"[\w.]+", name) or not timm.is_model(name):
        raise ModelError(
            f"{where}: vision_cfg.timm_model_name is {_shown(name)}, which is no name of a model that timm "
            "itself has: correct it, or update timm"
        )


def _check_place(name: object, key: str, where: object) -> None:
    if not isinstance(name, str) or not (_HUB_ID.fullmatch(name) or folder_exists(name)):
        raise ModelError(
            f"{where}: {key} is {_shown(name)}, neither a hub id (owner/name) nor a folder that is there"
        )


def _declared(kind: Any, values: Mapping[str, Any], where: object) -> dict[str, Any]:
    own = {name for name in _fields(kind) if not _UNSAFE.search(name)} | set(_SHARED)
    parts = getattr(kind, "sub_configs_defaults", None) or getattr(kind, "sub_configs", None) or {}
    inner = {name: getattr(spec, "config_class", spec) for name, spec in parts.items()}
    kept: dict[str, Any] = {}
    for key, value in values.items():
        # Early repositories say `text_config_dict` beside, or in place of, `text_config`.
        part = inner.get(key.removesuffix("_dict"))
        if part is not None and value is not None:
            inside = _mapping(value, key, where)
            named = _named(part, inside, where)
            kind_of_part = {} if named is part else {"model_type": named.model_type}
            kept[key] = {**_declared(named, inside, where), **kind_of_part}
        elif key in own:
            kept[key] = _plain(value, key, where)
    return kept


def _named(part: Any, values: Mapping[str, Any], where: object) -> Any:
    """The class of a part; LLaVA's parts are of whatever type they name themselves."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if part is not AutoConfig:
        return part
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ModelError(f"{where}: transformers has no model of type {_shown(kind)}: correct model_type")
    return CONFIG_MAPPING[kind]


def _fields(kind: Any) -> set[str]:
    """Settings that a configuration class declares itself, and not as every class of transformers does."""
    from transformers import PreTrainedConfig

    if not dataclasses.is_dataclass(kind):  # early releases of transformers 5
        return set(inspect.signature(kind).parameters) - {"kwargs"}
    shared = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    return {field.name for field in dataclasses.fields(kind)} - shared


def _plain(value: Any, key: str, where: object) -> Any:
    """A number, word, flag or short list of those; raises ModelError for anything else."""
    is_list = isinstance(value, (list, tuple))
    rows = value if is_list else [value]
    pairs = key.rpartition(".")[2] == "image_grid_pinpoints"  # of LLaVA-NeXT
    items = [
        i for row in rows[:65] for i in (row[:65] if pairs and isinstance(row, (list, tuple)) else [row])
    ]
    if len(items) > 64 or not all(_is_scalar(item) for item in items):
        raise ModelError(f"{where}: {key} is {_shown(value)} where a number, a word or a short list belongs")
    limit = _MOST_BLOCKS if key.rpartition(".")[2] in ("layers", "num_hidden_layers") else _LARGEST
    if any(isinstance(item, (int, float)) and abs(item) > limit for item in items):
        raise ModelError(f"{where}: {key} is {_shown(value)}: it may be at most {limit:,}")
    return list(value) if is_list else value


def _is_scalar(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, (bool, int)) or (isinstance(value, str) and len(value) <= 300)


def _mapping(value: object, key: str, where: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ModelError(f"{where}: {key} is {_shown(value)} where an object of settings belongs")
    return value


def _unknown(key: str, where: object, known: Iterable[str]) -> ModelError:
    if key.rpartition(".")[2] in _REMOTE:
        return ModelError(
            f"{where} asks for {key}, which would run code that came with the model; that is never run: "
            "remove the entry, and take a model and tokenizer that transformers itself knows"
        )
    listed = list(known)
    ending = ", …" if len(listed) > 12 else ""
    return ModelError(
        f"{where}: {_shown(key)} is no setting of an open_clip model that clipgraft hands on: remove it "
        f"(there are {', '.join(listed[:12])}{ending})"
    )


def _shown(value: object) -> str:
    # Not repr of the whole: it may be as deep or as long as a stranger likes.
    if isinstance(value, (Mapping, list, tuple)):
        return f"{type(value).__name__} of {len(value)}"
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 64:
        return "a number of many digits"
    text = repr(value[:60] if isinstance(value, str) else value)
    return text if len(text) <= 80 else f"{text[:79]}…"
