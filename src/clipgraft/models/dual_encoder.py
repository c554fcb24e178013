"""`DualEncoder`: two towers of the user's own as one model, and a table of features in place of a tower.

Any `nn.Module` is such a model that has `vision_tower`, `text_tower`, `logit_scale`, `encode_image` and
`encode_text`; `DualEncoder` is the one for towers of transformers, timm or torch. The rest of the protocol,
`OwnTowers`, may be left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipgraft.errors import DataError, ModelError
from clipgraft.models.encoder_sites import PLACES
from clipgraft.models.padding import check_padding, hf_ends, hf_mask, longest
from clipgraft.models.processors import HfPreprocess, HfTokenizer

_LENGTH = 77


class OwnTowers(Protocol):
    """What a model of two towers must have, and what it may have.

    Attributes:
        vision_tower, text_tower: the towers. Their Linears, embeddings and convolutions are sites where
            `places`, or the names of transformers, timm and torch, tell their role.
        vision_projection, text_projection: from a tower to the features, if there are any.
        logit_scale: scalar Parameter, the log of the inverse temperature.
        tokenizer: strings -> (N, L) int64 ids (`clipgraft.models.processors.Tokenizer`); None without.
        preprocess: PIL image -> (3, H, W) float tensor; None without.
        places: the role (`q`, `k`, `v`, `out`, `fc1`, `gate`, `fc2`, …) of each module of a block, by its
            path in the block. Blocks are items of a `ModuleList` or `Sequential`.
    """

    vision_tower: nn.Module
    text_tower: nn.Module
    logit_scale: nn.Parameter

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) pixels -> (N, D) features, not normalised."""

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(N, L) token ids -> (N, D) features, not normalised."""

    def text_ends(self, tokens: Tensor) -> Tensor | None:
        """(N,) position behind which ids change nothing and may be cut; None where they may not be."""


class DualEncoder(nn.Module):
    """Join an image tower and a text tower of any kind into one model like CLIP.

    A tower is a module from pixels or ids to (N, D) features, or a model of transformers. Of such a model
    the projected or pooled output is taken, and without one the mean over all tokens that are no padding; the
    mask of padding is made of the ids.

    Raises:
        ModelError: a tower is a decoder, or an encoder together with one.
    """

    places: Mapping[str, str] = PLACES

    def __init__(
        self,
        vision_tower: nn.Module,
        text_tower: nn.Module,
        vision_projection: nn.Module | None = None,
        text_projection: nn.Module | None = None,
        *,
        tokenizer: Any = None,
        preprocess: Any = None,
    ) -> None:
        """`tokenizer` and `preprocess` may be a tokenizer and an image processor of transformers.

        A tokenizer of transformers makes 77 ids of every text, or fewer where the tower takes fewer; for
        another length pass `clipgraft.models.processors.HfTokenizer(tokenizer, length)`.
        """
        super().__init__()
        for tower in (vision_tower, text_tower):
            check_is_encoder(tower)
        self.vision_tower, self.text_tower = vision_tower, text_tower
        self.vision_projection, self.text_projection = vision_projection, text_projection
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.tokenizer = _as_tokenizer(tokenizer, text_tower)
        self.preprocess = HfPreprocess(preprocess) if hasattr(preprocess, "image_mean") else preprocess

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) pixels -> (N, D) features, not normalised."""
        tower = self.vision_tower
        output = tower(pixel_values=pixels) if _is_hf(tower) else tower(pixels)
        return _projected(_pooled(output, None), self.vision_projection)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(N, L) token ids -> (N, D) features, not normalised."""
        tower = self.text_tower
        if not _is_hf(tower):
            return _projected(_pooled(tower(tokens), None), self.text_projection)
        mask = hf_mask(tower.config, tokens)
        output = tower(input_ids=tokens, attention_mask=mask)
        return _projected(_pooled(output, mask), self.text_projection)

    def text_ends(self, tokens: Tensor) -> Tensor | None:
        """(N,) position behind which ids change nothing; None for towers whose padding is not known to."""
        return hf_ends(self.text_tower.config, tokens) if _is_hf(self.text_tower) else None


class FeatureTable(nn.Module):
    """Stand where a frozen tower would, with features that were computed elsewhere.

    A tower alone trains against it: `DualEncoder(FeatureTable(features_of_images), text_model)`. `fit`,
    `evaluate_retrieval` and all else that encodes files or captions looks them up.
    """

    features: Tensor

    def __init__(self, keys: Sequence[str | PathLike[str]], features: Tensor) -> None:
        """`keys`: N paths of images or N captions; `features`: (N, D), of any norm.

        Raises:
            DataError: not one row a key.
        """
        super().__init__()
        if features.ndim != 2 or len(features) != len(keys):
            raise DataError(
                f"a table of features has one row a key: {len(keys)} keys, features {tuple(features.shape)}"
            )
        self.register_buffer("features", features.detach().float())
        # Paths are known by what they were given as, and by where they lead.
        self.rows = {
            known: row for row, key in enumerate(keys) for known in (str(key), str(Path(key).absolute()))
        }

    def look_up(self, keys: Sequence[str | PathLike[str]]) -> Tensor:
        """(n, D) unit-norm features; raises DataError that names the first key without."""
        found = [self.rows.get(str(key), self.rows.get(str(Path(key).absolute()))) for key in keys]
        missing = [key for key, row in zip(keys, found, strict=True) if row is None]
        if missing:
            raise DataError(
                f"the table of features lacks {len(missing)} of {len(keys)} entries, first {missing[0]}: add "
                "their features, or leave those rows out"
            )
        return F.normalize(self.features[torch.tensor(found)], dim=-1)

    def forward(self, inputs: Tensor) -> Tensor:
        """Refuse to compute anything; raises ModelError."""
        raise ModelError(
            "this tower is a table of features and encodes nothing new: encode files or captions of the table"
        )


def check_is_encoder(tower: nn.Module) -> None:
    """Refuse decoders, which pool nothing; raises ModelError that says what to pass instead."""
    config, name = getattr(tower, "config", None), type(tower).__name__
    if getattr(config, "is_encoder_decoder", False) and hasattr(tower, "decoder"):
        raise ModelError(f"{name} is an encoder with a decoder: pass its encoder, model.get_encoder()")
    if "ForCausalLM" in name or "LMHead" in name or "ForConditionalGeneration" in name:
        raise ModelError(
            f"{name} is a decoder, whose output is the next token and no feature of a text: pass an encoder "
            "(BERT, XLM-R, mT5, NLLB, CLIP), or wrap it in a module that returns (N, D) features"
        )


def _as_tokenizer(tokenizer: Any, tower: nn.Module) -> Any:
    if not hasattr(tokenizer, "pad_token_id"):
        return tokenizer
    check_padding(getattr(tower, "config", None), tokenizer, type(tower).__name__)
    return HfTokenizer(tokenizer, min(_LENGTH, longest(getattr(tower, "config", None))))


def _is_hf(tower: nn.Module) -> bool:
    return hasattr(tower, "config") and hasattr(tower, "base_model_prefix")


def _pooled(output: Any, mask: Tensor | None) -> Tensor:
    if isinstance(output, Tensor):
        return output
    for name in ("image_embeds", "text_embeds", "pooler_output"):
        features = getattr(output, name, None)
        if isinstance(features, Tensor):
            return features
    states: Tensor = output.last_hidden_state
    if mask is None:
        return states.mean(dim=1)
    weights = mask[..., None].to(states.dtype)
    return (states * weights).sum(dim=1) / weights.sum(dim=1)


def _projected(features: Tensor, projection: nn.Module | None) -> Tensor:
    found: Tensor = features if projection is None else projection(features)
    return found
