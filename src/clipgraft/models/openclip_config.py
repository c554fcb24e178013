"""Read the configuration of an open_clip model: by name, from a JSON file, from a folder, from the hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipgraft.errors import ModelError
from clipgraft.models.allowed import openclip_config, preprocess_config, text_tower_config
from clipgraft.models.load_errors import (
    KNOWN_HUB_IDS,
    config_failure,
    nearest,
    one_line,
)
from clipgraft.readers import placeholder

CONFIG_FILE = "open_clip_config.json"
HUB = "hf-hub:"


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
    """Look at the configuration of a text tower of transformers before open_clip builds one from it."""
    name = settings["text_cfg"].get("hf_model_name")
    if not name:
        return
    from transformers import PreTrainedConfig

    values, _ = PreTrainedConfig.get_config_dict(name)
    text_tower_config(values, f"{where}: text_cfg.hf_model_name {name}")


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


def named_config(model_name: str, name: object) -> dict[str, Any]:
    """open_clip's own configuration of a name, checked as a stranger's is."""
    import open_clip

    return openclip_config(open_clip.get_model_config(model_name) or {}, name)


def borrows(config: Mapping[str, Any] | None, tokenizer: bool = True) -> bool:
    """Whether a model's text tower, or its tokenizer, is one of transformers and comes from the hub."""
    text = (config or {}).get("text_cfg", {})
    return bool(text.get("hf_model_name") or (tokenizer and text.get("hf_tokenizer_name")))
