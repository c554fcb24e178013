"""Loading with transformers: a hub id or a local folder of a `CLIPModel`."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipgraft.errors import ModelError
from clipgraft.models.clip import Clip, Source, family_of
from clipgraft.models.failures import hf_failure
from clipgraft.models.hub import hub_access
from clipgraft.models.tokenizers import HfTokenizer


def load_hf(path: str, name: str) -> Clip:
    """A `transformers.CLIPModel` with its tokenizer and image processor; code from the hub is never run.

    Raises:
        ModelError: it cannot be fetched or read, is no CLIP model, or comes without some of its parts.
    """
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, PreTrainedConfig

    check_path(path)
    with hub_access(needed=not Path(path).is_dir()) as offline:
        try:
            config, _ = PreTrainedConfig.get_config_dict(path)
            _check_model_type(path, config.get("model_type"))
            model, report = CLIPModel.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
            _check_complete(path, report["missing_keys"])
            inner = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=False)
        except ModelError:
            raise
        except Exception as error:
            raise hf_failure(path, error, offline) from error
    _check_vocabulary(path, inner, model.config.text_config.vocab_size)
    family = family_of(model)
    tokenizer = HfTokenizer(inner, family.context_length(model))
    return Clip(model, family, tokenizer, HfPreprocess(processor), None, Source(name))


def check_path(path: str) -> None:
    """Refuse what is neither a folder with a model in it nor written like a hub id."""
    if not path:
        raise ModelError("'hf:' names no model: write hf:owner/name, or hf: and a local folder")
    if Path(path).is_dir():
        if not (Path(path) / "config.json").is_file():
            raise ModelError(f"{path} has no config.json: it is no transformers model folder")
    elif path.startswith((".", "~", "/")) or "\\" in path or path.count("/") > 1:
        raise ModelError(f"{path}: there is no such folder (hub ids are written owner/name)")


def _check_model_type(path: str, kind: object) -> None:
    if kind is None and not Path(path).is_dir():
        raise ModelError(f"hf:{path} has no config.json: if it holds an open_clip model, load hf-hub:{path}")
    # transformers would load another type's weights where names agree and draw the rest at random.
    if kind != "clip":
        raise ModelError(f"{path} holds a '{kind}' model: clipgraft loads transformers models of type 'clip'")


def _check_complete(path: str, missing: Collection[str]) -> None:
    if missing:
        raise ModelError(
            f"{path} lacks {len(missing)} of the model's weights, such as {min(missing)}: "
            "fetch or save the model again"
        )


def _check_vocabulary(path: str, inner: Any, rows: int) -> None:
    """Refuse a tokenizer that does not fit the model; without its files transformers makes an empty one."""
    ids = set(inner.get_vocab().values())
    if ids <= set(inner.all_special_ids):
        raise ModelError(f"{path} has no tokenizer: tokenizer.json, or vocab.json and merges.txt, is missing")
    if max(ids) >= rows:
        raise ModelError(
            f"{path}: the tokenizer has ids up to {max(ids)} but the model only {rows} token embeddings; "
            "they are not of one model"
        )


class HfPreprocess:
    """A transformers image processor as a transform, PIL image -> (3, H, W), that workers can carry."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, image: Any) -> Tensor:
        pixels: Tensor = self.processor(image, return_tensors="pt")["pixel_values"][0]
        return pixels

    def __repr__(self) -> str:
        return repr(self.processor)
