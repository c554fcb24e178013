"""Tokenizers and image preprocessing of both families behind one interface each.

`find_tokenizer` and `find_preprocess` look for those of a raw model that `clipgraft.load` did not load.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from PIL import Image
from PIL.Image import Image as Picture
from torch import Tensor, nn

from clipgraft.errors import ModelError
from clipgraft.models.family import Family
from clipgraft.models.hub import one_line
from clipgraft.models.library_calls import quiet_libraries
from clipgraft.models.rwlock import rwlock_of
from clipgraft.models.sites import Site

Preprocess: TypeAlias = Callable[[Picture], Tensor]


class Tokenizer(Protocol):
    """Strings to ids, and how long each would be without the context's limit."""

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Texts -> (N, context length) int64 ids, truncated and padded."""

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of every text, start and end tokens included, before truncation."""


# Tokenizers of transformers keep padding and truncation on themselves: two threads take each other's.
_SETTINGS = threading.Lock()


@dataclass(frozen=True)
class OpenClipTokenizer:
    """open_clip's tokenizer object: `SimpleTokenizer`, or `HFTokenizer` around one of transformers."""

    inner: Any
    context_length: int

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Texts -> (N, context length) int64 ids."""
        with _SETTINGS:
            ids: Tensor = self.inner(list(texts), context_length=self.context_length)
        return ids.long()

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of every text with start and end, before truncation."""
        if hasattr(self.inner, "encode"):
            return [len(self.inner.encode(text)) + 2 for text in texts]
        if not texts:
            return []
        clean = getattr(self.inner, "clean_fn", str)
        cleaned = [clean(text) for text in texts]
        with _SETTINGS:
            return [len(ids) for ids in self.inner.tokenizer(cleaned, verbose=False)["input_ids"]]


@dataclass(frozen=True)
class HfTokenizer:
    """A transformers tokenizer padded to the context length, as CLIP was trained."""

    inner: Any
    context_length: int

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Texts -> (N, context length) int64 ids."""
        if not texts:
            return torch.empty(0, self.context_length, dtype=torch.long)
        with _SETTINGS:
            encoded = self.inner(
                list(texts), padding="max_length", truncation=True, max_length=self.context_length
            )
        return torch.tensor(encoded["input_ids"], dtype=torch.long).reshape(len(texts), self.context_length)

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of every text with start and end, before truncation."""
        if not texts:
            return []
        with _SETTINGS:
            return [len(ids) for ids in self.inner(list(texts), verbose=False)["input_ids"]]


class HfPreprocess:
    """A transformers image processor as a transform, PIL image -> (3, H, W), that workers can carry."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, image: Any) -> Tensor:
        pixels: Tensor = self.processor(image, return_tensors="pt")["pixel_values"][0]
        return pixels

    def __repr__(self) -> str:
        return repr(self.processor)


_CLIP_VOCABULARY = 49408


def find_tokenizer(family: Family, model: nn.Module) -> Tokenizer | None:
    """CLIP's own tokenizer for its vocabulary, or the one beside a transformers model's weights."""
    if family.name == "open_clip":
        from open_clip.tokenizer import SimpleTokenizer

        with rwlock_of(model).read():
            refs = family.site_refs(model)
        embedding = refs.get(Site("text", None, "token_embedding"))
        if embedding is None or embedding.shape[0] != _CLIP_VOCABULARY:
            return None
        return OpenClipTokenizer(SimpleTokenizer(), family.context_length(model))
    inner = _from_same_place("AutoTokenizer", model)
    return None if inner is None else HfTokenizer(inner, family.context_length(model))


def find_preprocess(family: Family, model: nn.Module) -> Preprocess | None:
    """The transform that open_clip recorded on the model, or the processor beside a transformers model."""
    if family.name == "open_clip":
        from open_clip.transform import PreprocessCfg, image_transform_v2

        recorded = getattr(model.visual, "preprocess_cfg", None)
        if recorded is None:
            return None
        transform: Preprocess = image_transform_v2(PreprocessCfg(**recorded), is_train=False)
        return transform
    processor = _from_same_place("AutoImageProcessor", model)
    return None if processor is None else HfPreprocess(processor)


def _from_same_place(kind: str, model: nn.Module) -> Any:
    """What transformers finds at the folder or cached id that the model was loaded from, or None."""
    import transformers

    path = getattr(model, "name_or_path", "")
    if not path:
        return None
    try:
        with quiet_libraries():
            return getattr(transformers, kind).from_pretrained(
                path, local_files_only=True, trust_remote_code=False
            )
    except (OSError, ValueError):
        return None


def check_preprocess(preprocess: Any, size: tuple[int, int], where: object) -> None:
    """Try a preprocessing of a stranger's file on one small image.

    Raises:
        ModelError: it gives something else than the pixels that the model takes.
    """
    image = Image.new("RGB", (9, 8))
    try:
        given = tuple(preprocess(image).shape)
    except Exception as error:
        raise ModelError(f"{where}: its image preprocessing cannot be used: {one_line(error)}") from error
    if given != (3, *size):
        raise ModelError(
            f"{where}: its image preprocessing gives {given} where the model takes {(3, *size)}: "
            "correct its preprocessor_config.json or preprocess_cfg"
        )
