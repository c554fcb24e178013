"""`Clip`: one handle on a CLIP model, whichever library it came from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor, nn

from clipgraft.errors import DataError, ModelError
from clipgraft.models.device import queued
from clipgraft.models.dual_encoder import FeatureTable, check_is_encoder
from clipgraft.models.family import Family, is_lora
from clipgraft.models.hf import HfFamily
from clipgraft.models.library_calls import log_reading
from clipgraft.models.lone_tower import LoneTowerFamily, check_has_tower, lone_tower, unused_scale
from clipgraft.models.mapped_weights import check_unchanged
from clipgraft.models.openclip import OpenClipFamily
from clipgraft.models.own_towers import OwnTowersFamily
from clipgraft.models.processors import Preprocess, Tokenizer, find_preprocess, find_tokenizer
from clipgraft.models.rwlock import rwlock_of
from clipgraft.models.sites import TOWERS, Site, SiteRef, Tower
from clipgraft.models.vision_text import VisionTextFamily
from clipgraft.pictures import open_image
from clipgraft.process_memory import drop_mapped

if TYPE_CHECKING:
    from typing_extensions import Self

Picture: TypeAlias = str | PathLike[str] | Image | Tensor | np.ndarray[Any, Any]
Images: TypeAlias = Picture | Sequence[Picture]
FAMILIES: tuple[Family, ...] = (
    VisionTextFamily(),
    HfFamily(),
    OpenClipFamily(),
    LoneTowerFamily(),
    OwnTowersFamily(),
)
_FINGERPRINT = "_clipgraft_fingerprint"
_NOT_IDENTITY = ("logit_scale", "logit_bias")


@dataclass(frozen=True)
class Source:
    """Where a base came from, as written into adapter files."""

    name: str = ""
    pretrained: str = ""


@dataclass(eq=False)
class Clip:
    """A CLIP model with its tokenizer, preprocessing and sites.

    Attributes:
        model: the open_clip or transformers model itself; adapters are attached to it in place.
        family: what knows the model's module paths.
        tokenizer: for a raw model found on first use, where the model tells which; else None.
        preprocess: PIL image -> (3, H, W) float tensor, deterministic. Found likewise.
        preprocess_train: the augmenting transform to train with, if the source has one.
        source: name and tag the base was loaded from.
        notes: what loading chose, changed or left out, a line each.
    """

    model: nn.Module
    family: Family
    tokenizer: Tokenizer | None = None
    preprocess: Preprocess | None = None
    preprocess_train: Preprocess | None = None
    source: Source = field(default_factory=Source)
    notes: tuple[str, ...] = ()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the base's matrix weights."""
        with rwlock_of(self.model).read():
            named = self.model.named_parameters()
            return next(p.dtype for name, p in named if p.ndim >= 2 and not is_lora(name))

    @property
    def logit_scale(self) -> nn.Parameter:
        """Log of the inverse temperature, as the model trains it; a constant for a tower alone."""
        scale = getattr(self.model, "logit_scale", None)
        return scale if isinstance(scale, nn.Parameter) else unused_scale(self.model)

    @property
    def towers(self) -> tuple[Tower, ...]:
        """Those that encode anything: both; of a tower alone, or beside a table of features, that one."""
        alone = lone_tower(self.model)
        return tuple(tower for tower in TOWERS if alone in (None, tower) and self.table(tower) is None)

    def table(self, tower: Tower) -> FeatureTable | None:
        """The table of features that stands in place of a tower (`DualEncoder`), if one does."""
        owner = getattr(self.model, f"{tower}_tower", None)
        return owner if isinstance(owner, FeatureTable) else None

    @property
    def logit_bias(self) -> nn.Parameter | None:
        """What SigLIP adds to every logit, a scalar or (1,); None for models without it, as CLIP is."""
        bias = getattr(self.model, "logit_bias", None)
        return bias if isinstance(bias, nn.Parameter) else None

    @property
    def temperature(self) -> dict[str, nn.Parameter]:
        """What makes logits of cosines, by name: `logit_scale`, and `logit_bias` where there is one."""
        bias = self.logit_bias
        return {"logit_scale": self.logit_scale, **({} if bias is None else {"logit_bias": bias})}

    @property
    def context_length(self) -> int:
        return self.family.context_length(self.model)

    @property
    def site_refs(self) -> dict[Site, SiteRef]:
        """Every site with the place of its weight, in the order of the data flow."""
        with rwlock_of(self.model).read():
            return self.family.site_refs(self.model)

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every place of the model that can carry LoRA, in the order of the data flow."""
        return tuple(self.site_refs)

    @property
    def fingerprint(self) -> str:
        """Content hash of the base weights: 16 hex digits, the same in both families.

        SHA-256 over every weight under its transformers name, rounded to bfloat16, so that a base loaded
        in fp32 and in bf16 is the same base. Adapters and the temperature are left out. Takes about a
        second for 600 MB, and is kept until a weight is changed in place (by an optimiser or
        `load_state_dict`). A model that carries LoRA keeps the one of the base it was attached to, merged or
        not. On the meta device, where there are no weights, their names and shapes are all that counts.
        """
        with rwlock_of(self.model).read():
            known, version = getattr(self.model, _FINGERPRINT, ("", -1))
            named = list(self.model.named_parameters())
            now = sum(p._version for _, p in named if not p.is_inference())
            if not known or (version != now and not any(is_lora(name) for name, _ in named)):
                known = self._fingerprint()
                object.__setattr__(self.model, _FINGERPRINT, (known, now))
            return str(known)

    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        weights = {n: w for n, w in self.family.canonical_weights(self.model) if n not in _NOT_IDENTITY}
        size = sum(weight.nbytes for weight in weights.values() if not weight.is_meta)
        log_reading("the weights for the fingerprint of the base", size)
        for name in sorted(weights):
            digest.update(f"{name}{tuple(weights[name].shape)}".encode())
            if weights[name].is_meta:
                continue
            weight = weights[name].detach().cpu()
            exact = weight.to(torch.bfloat16).view(torch.int16) if weight.is_floating_point() else weight
            digest.update(memoryview(exact.contiguous().numpy()).cast("B"))
            drop_mapped((weight,))
        check_unchanged(self.model)
        return digest.hexdigest()[:16]

    def tokenize(self, texts: str | Sequence[str]) -> Tensor:
        """Strings -> (N, context length) int64 token ids."""
        return self._require_tokenizer()([texts] if isinstance(texts, str) else list(texts))

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Token count of every text before truncation, start and end tokens included."""
        return self._require_tokenizer().count(texts)

    def require_inputs(self) -> None:
        """Raise ModelError for a model without the tokenizer or the preprocessing that its towers need."""
        if "text" in self.towers:
            self.tokenize("")
        if "vision" in self.towers:
            self.require_preprocess()

    def require_preprocess(self) -> Preprocess:
        """The deterministic image transform; raises ModelError for a raw model that does not tell its own."""
        check_has_tower(self.model, "vision")
        if self.preprocess is None:
            self.preprocess = find_preprocess(self.family, self.model)
        if self.preprocess is None:
            raise ModelError("this model has no preprocessing: load it with clipgraft.load(...)")
        return self.preprocess

    def _require_tokenizer(self) -> Tokenizer:
        check_has_tower(self.model, "text")
        if self.tokenizer is None:
            self.tokenizer = find_tokenizer(self.family, self.model)
        if self.tokenizer is None:
            raise ModelError(
                "this model has no tokenizer: load it with clipgraft.load(...), "
                "or pass token ids instead of strings"
            )
        return self.tokenizer

    def __repr__(self) -> str:
        name = " / ".join(part for part in (self.source.name, self.source.pretrained) if part)
        weights = sum(weight.numel() for weight in self.model.parameters())
        kind = f"{type(self.model).__name__} of {self.family.name}"
        return f"Clip({name or 'a model of yours'}, {kind}, {weights:,} weights on {self.device})"

    def pixels(self, images: Images) -> Tensor:
        """(N, 3, H, W) of a picture, a path, or several of both; tensors of that shape pass."""
        if isinstance(images, Tensor):
            return images if images.ndim == 4 else images[None]
        if isinstance(images, str | PathLike | Image | np.ndarray):
            images = [images]
        if not len(images):
            raise DataError("no image to encode: give at least one")
        return torch.stack([self._pixels(image) for image in images])

    def _pixels(self, image: Picture) -> Tensor:
        if isinstance(image, Tensor):
            return image
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim not in (2, 3):
                shape = f"an array of {image.dtype} {image.shape}"
                raise DataError(f"{shape} is no picture: pass uint8 (height, width, 3)")
            picture = PIL.Image.fromarray(image)
        else:
            picture = image if isinstance(image, Image) else open_image(Path(image))
        return self.require_preprocess()(picture.convert("RGB"))

    def encode_image(self, images: Images, normalize: bool = False) -> Tensor:
        """Pictures, paths, or (N, 3, H, W) preprocessed pixels -> (N, D) features, unit-norm if `normalize`.

        Args:
            images: a PIL image, a uint8 array (height, width, 3), a path, a list of these, or the pixels.
            normalize: divide by the norm. Normalised features are at least fp32: in bf16 a norm is off by up
                to 0.4 %.

        Raises:
            DataError: a file is no image that can be read.
        """
        pixels = queued(self.pixels(images).to(self.dtype), self.device)
        with rwlock_of(self.model).read():
            features = self.family.encode_image(self.model, pixels)
        return unit_norm(features) if normalize else features

    def encode_text(self, texts: Tensor | str | Sequence[str], normalize: bool = False) -> Tensor:
        """Strings or (N, L) token ids -> (N, D) features, unit-norm if `normalize`.

        Tokens that the pooled token cannot see are cut before the tower runs, which changes nothing but
        the time. Arguments, errors and types otherwise as for images.
        """
        tokens = self.tokens(texts)
        with rwlock_of(self.model).read():
            features = self.family.encode_text(self.model, tokens)
        return unit_norm(features) if normalize else features

    def tokens(self, texts: Tensor | str | Sequence[str]) -> Tensor:
        """Strings or (N, L) ids -> ids on the model's device, cut by `cut_tokens`."""
        ids = texts if isinstance(texts, Tensor) else self.tokenize(texts)
        return queued(self.cut_tokens(ids), self.device)

    def cut_tokens(self, tokens: Tensor) -> Tensor:
        """(N, L) ids without the columns that no row's pooled token can see, where the family allows it."""
        ends = self.family.text_ends(self.model, tokens) if len(tokens) else None
        return tokens if ends is None else tokens[:, : int(ends.max()) + 1]

    def eval(self) -> Self:
        self.model.eval()
        return self

    def train(self, mode: bool = True) -> Self:
        self.model.train(mode)
        return self

    def to(self, *args: Any, **kwargs: Any) -> Self:
        self.model.to(*args, **kwargs)
        return self


def unit_norm(features: Tensor) -> Tensor:
    """Divide each row by its Euclidean norm, in fp32 at least."""
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


ClipLike: TypeAlias = Clip | nn.Module


def family_of(model: nn.Module) -> Family:
    """The family that knows a model; raises ModelError for a model of none, with what to do instead."""
    for family in FAMILIES:
        if family.accepts(model):
            return family
    raise ModelError(_refusal(model))


def _refusal(model: nn.Module) -> str:
    name = type(model).__name__
    if hasattr(model, "audio_model") or name.startswith("Clap"):
        return (
            f"{name} compares texts with sounds, and clipgraft reads images: adapt it with PEFT, or join its "
            "text tower with an image tower of yours (clipgraft.models.DualEncoder)"
        )
    if isinstance(getattr(model, "clip", None), nn.Module):
        return (
            f"{name} gives masks of images and no features: pass the CLIP model that it holds, model.clip; "
            "what is adapted there acts in the whole model too"
        )
    check_is_encoder(model)
    if hasattr(model, "config") and hasattr(model, "base_model_prefix"):
        return (
            f"{name} is one tower or no CLIP model at all: join a text and an image tower with "
            "clipgraft.models.DualEncoder(vision_tower, text_tower)"
        )
    return (
        f"{name} is no CLIP model clipgraft knows: pass an open_clip CLIP or CustomTextCLIP, a "
        "transformers.CLIPModel, what clipgraft.load returned, or two towers of yours as a "
        "clipgraft.models.DualEncoder"
    )


def as_clip(model: ClipLike) -> Clip:
    """A `Clip` over what the user holds; a raw model is wrapped in place, not copied."""
    return model if isinstance(model, Clip) else Clip(model, family_of(model))
