"""Loading with open_clip: built-in names, `hf-hub:` ids, local folders, JSON configs with a checkpoint."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clipgraft.errors import ModelError
from clipgraft.models.clip import Clip, Source, family_of
from clipgraft.models.failures import (
    KNOWN_HUB_IDS,
    checkpoint_failure,
    config_failure,
    nearest,
    one_line,
    openclip_failure,
)
from clipgraft.models.hub import hub_access
from clipgraft.models.tokenizers import OpenClipTokenizer

CONFIG_FILE = "open_clip_config.json"
CHECKPOINT_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
RANDOM_WEIGHTS = "none"
HUB = "hf-hub:"


def load_name(name: str, pretrained: str, seed: int) -> Clip:
    """An open_clip model by name with a tag, a checkpoint or random weights; or `hf-hub:` and a hub id.

    Raises:
        ModelError: no such name or tag, or the weights cannot be fetched or read.
    """
    import open_clip

    # open_clip's tokenizer look-up does not know the spelling ViT-B/32, which its model look-up takes.
    model_name = name if name.startswith(HUB) else name.replace("/", "-")
    if not name.startswith(HUB):
        _check_name(name, model_name, pretrained)
    is_file, random = Path(pretrained).is_file(), pretrained == RANDOM_WEIGHTS
    with hub_access(not (is_file or random) or borrows(open_clip.get_model_config(model_name))) as offline:
        try:
            with _seeded(seed, random):
                model, train_transform, eval_transform = open_clip.create_model_and_transforms(
                    model_name,
                    pretrained=None if random else pretrained or None,
                    require_pretrained=not random,
                    pretrained_text=not random,
                )
            inner = open_clip.get_tokenizer(model_name)
        except Exception as error:
            if is_file and not offline:
                raise checkpoint_failure(pretrained, name, error) from error
            raise openclip_failure(name, pretrained, error, offline) from error
    return _clip(model, inner, eval_transform, train_transform, Source(name, pretrained))


def load_folder(folder: Path, name: str) -> Clip:
    """A local folder with `open_clip_config.json` and weights, as `push_to_hf_hub` lays one out.

    Raises:
        ModelError: open_clip cannot build a model from it.
    """
    import open_clip

    local = f"local-dir:{folder}"
    try:
        with hub_access(borrows(open_clip.get_model_config(local), tokenizer=False)):
            model, train_transform, eval_transform = open_clip.create_model_and_transforms(
                local, require_pretrained=True
            )
            inner = open_clip.get_tokenizer(local)
    except Exception as error:
        raise config_failure(folder, error) from error
    return _clip(model, inner, eval_transform, train_transform, Source(name))


def load_config(path: Path, pretrained: str, seed: int) -> Clip:
    """A JSON model config, bare or as in `open_clip_config.json`, with a local checkpoint or random weights.

    Raises:
        ModelError: the config is not one of open_clip, or the checkpoint is damaged or of another model.
    """
    import open_clip

    config = _read_config(path)
    random = pretrained == RANDOM_WEIGHTS
    if not random:
        _check_checkpoint(path, pretrained)
    with hub_access(borrows(config["model_cfg"])), tempfile.TemporaryDirectory() as folder:
        # A folder rather than open_clip's registry: a config named ViT-B-32.json must not become ViT-B-32.
        (Path(folder) / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
        try:
            with _seeded(seed, random):
                model, train_transform, eval_transform = open_clip.create_model_and_transforms(
                    f"local-dir:{folder}", load_weights=False, pretrained_text=False
                )
            inner = _tokenizer(config["model_cfg"]["text_cfg"])
        except Exception as error:
            raise config_failure(path, error) from error
    if not random:
        try:
            open_clip.load_checkpoint(model, pretrained)
        except Exception as error:
            raise checkpoint_failure(pretrained, str(path), error) from error
    return _clip(model, inner, eval_transform, train_transform, Source(str(path), pretrained))


def is_openclip(name: str) -> bool:
    """Whether a name that brings its own weights is of open_clip: a hub id, or a local folder."""
    return name.startswith(HUB) or (Path(name) / CONFIG_FILE).is_file()


def with_weights(clip: Clip, pretrained: str) -> Clip:
    """A loaded model with the weights of a local checkpoint instead, as a run that fine-tuned it left them.

    Raises:
        ModelError: the checkpoint is damaged or of another model.
    """
    import open_clip

    try:
        open_clip.load_checkpoint(clip.model, pretrained)
    except Exception as error:
        raise checkpoint_failure(pretrained, clip.source.name, error) from error
    return replace(clip, source=Source(clip.source.name, pretrained))


def model_config(name: str) -> dict[str, Any]:
    """The `model_cfg` of a base that one of the loaders above loaded under this name.

    Raises:
        ModelError: there is none, or not any more.
    """
    import open_clip

    path = Path(name)
    config: dict[str, Any] | None = None
    if path.suffix == ".json":
        config = _read_config(path)["model_cfg"]
    elif name:
        local = f"local-dir:{path}" if path.is_dir() else name.replace("/", "-")
        try:
            config = open_clip.get_model_config(name if name.startswith(HUB) else local)
        except Exception as error:
            raise config_failure(name, error) from error
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


def _check_name(name: str, model_name: str, pretrained: str) -> None:
    """Refuse what open_clip would refuse, before it builds anything, with the nearest names."""
    import open_clip

    check_known(name)
    if pretrained == RANDOM_WEIGHTS or Path(pretrained).is_file():
        return
    tags = open_clip.list_pretrained_tags_by_model(model_name)
    listed = ", ".join(tags[:6]) + (", …" if len(tags) > 6 else "")
    if not pretrained:
        raise ModelError(
            f"model '{name}' needs weights: --pretrained takes {f'a tag ({listed}), ' if tags else ''}"
            f"a local checkpoint, or '{RANDOM_WEIGHTS}' for random weights"
        )
    if Path(pretrained).suffix in CHECKPOINT_SUFFIXES:
        raise ModelError(f"--pretrained {pretrained}: there is no such file")
    if not open_clip.get_pretrained_cfg(model_name, pretrained):
        raise ModelError(
            f"model '{name}' has no pretrained tag '{pretrained}'{nearest(pretrained, tags)}; "
            f"known tags: {', '.join(tags) or 'none'}"
        )


def _check_checkpoint(path: Path, pretrained: str) -> None:
    if not pretrained:
        raise ModelError(
            f"model config {path} needs weights: --pretrained takes a local checkpoint, "
            f"or '{RANDOM_WEIGHTS}' for random weights"
        )
    if not Path(pretrained).is_file():
        raise ModelError(f"--pretrained {pretrained}: there is no such file, and a JSON config has no tags")


def _read_config(path: Path) -> dict[str, Any]:
    """The parts `model_cfg` and `preprocess_cfg` of a JSON file, which may be the former alone."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"model config {path}: there is no such file") from error
    except (ValueError, OSError) as error:
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
    return {"model_cfg": model, "preprocess_cfg": whole.get("preprocess_cfg", {})}


def borrows(config: Mapping[str, Any] | None, tokenizer: bool = True) -> bool:
    """Whether a model's text tower, or its tokenizer, is one of transformers and comes from the hub."""
    text = (config or {}).get("text_cfg", {})
    return bool(text.get("hf_model_name") or (tokenizer and text.get("hf_tokenizer_name")))


def _tokenizer(text: Mapping[str, Any]) -> Any:
    """The tokenizer that a text configuration asks for, as open_clip picks it for its built-in names."""
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    kwargs = {"context_length": text.get("context_length", 77), **text.get("tokenizer_kwargs", {})}
    if source := text.get("hf_tokenizer_name"):
        return HFTokenizer(source, tokenizer_mode=text.get("tokenizer_mode"), **kwargs)
    return SimpleTokenizer(**kwargs)


@contextlib.contextmanager
def _seeded(seed: int, enabled: bool) -> Iterator[None]:
    """Draw random weights from `seed` without disturbing the caller's generator."""
    with torch.random.fork_rng(devices=[], enabled=enabled):
        if enabled:
            torch.default_generator.manual_seed(seed)
        yield


def _clip(model: nn.Module, inner: Any, evaluate: Any, train: Any, source: Source) -> Clip:
    family = family_of(model)
    # A text tower of transformers takes more tokens than its tokenizer is to produce.
    length = getattr(inner, "context_length", None) or family.context_length(model)
    return Clip(model, family, OpenClipTokenizer(inner, length), evaluate, train, source)
