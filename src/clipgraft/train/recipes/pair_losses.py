"""The losses of a batch of pairs: softmax, as CLIP is trained, and sigmoid, as SigLIP is.

Two pairs of the same image, or with the same caption, are no negatives of each other in either: what compares
them is left out, so that a batch with several captions of one image is not told to push them apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgraft.errors import ConfigError
from clipgraft.models.clip import Clip
from clipgraft.models.device import queued
from clipgraft.train.args import LossKind
from clipgraft.train.recipes.gallery import Gallery


def choose_loss(clip: Clip, asked: LossKind | Literal["auto"]) -> LossKind:
    """The loss that a model is trained with: as asked for; `auto` is the one that its base was made by.

    Raises:
        ConfigError: `sigmoid` for a model without the `logit_bias` that it needs.
    """
    if asked == "sigmoid" and clip.logit_bias is None:
        raise ConfigError(
            "`loss=sigmoid`: this base has no `logit_bias`, without which each pair of a batch begins as a "
            "match: use `loss=softmax`, or a base that has one (SigLIP, or an open_clip config with "
            "`init_logit_bias`)"
        )
    if asked == "auto":
        return "softmax" if clip.logit_bias is None else "sigmoid"
    return asked


class PairLoss(Protocol):
    """A loss of N pairs, each of which belongs together."""

    def __call__(self, images: Tensor, texts: Tensor, image_ids: Tensor, caption_ids: Tensor) -> Tensor:
        """(N, D) features of any norm each, (N,) ids on the CPU, equal for equal ones -> a scalar."""


def make_pair_loss(clip: Clip, kind: LossKind, gallery: Gallery | None = None) -> PairLoss:
    """The loss at a model's own temperature, over the batch or over a gallery."""
    if kind == "softmax":
        return SoftmaxLoss(clip.logit_scale, gallery)
    assert clip.logit_bias is not None
    return SigmoidLoss(clip.logit_scale, clip.logit_bias, gallery)


@dataclass(frozen=True)
class SoftmaxLoss:
    """Symmetric InfoNCE (Radford et al. 2021, arXiv:2103.00020): the mean of both `one_way_losses`.

    If there is a gallery, the trained tower's direction runs over it.

    Attributes:
        logit_scale: scalar log inverse temperature.
    """

    logit_scale: Tensor
    gallery: Gallery | None = None

    def __call__(self, images: Tensor, texts: Tensor, image_ids: Tensor, caption_ids: Tensor) -> Tensor:
        device, gallery = images.device, self.gallery
        ids = queued(image_ids, device), queued(caption_ids, device)
        to_text, to_image = one_way_losses(images, texts, self.logit_scale, *ids)
        if gallery is not None and gallery.of == "images":
            to_image = F.cross_entropy(*gallery.logits(texts, caption_ids, image_ids, self.logit_scale))
        elif gallery is not None:
            to_text = F.cross_entropy(*gallery.logits(images, image_ids, caption_ids, self.logit_scale))
        return (to_text + to_image) / 2


@dataclass(frozen=True)
class SigmoidLoss:
    """Pairwise sigmoid loss (Zhai et al. 2023, arXiv:2303.15343): each pair is a match or not, by itself.

    -1/N sum of log sigmoid(z (exp(scale) cos + bias)) over all images and texts of a batch, z = 1 where they
    belong together and else -1.

    A gallery holds the fixed tower's features of the batch too, so that the sum runs over N queries and its M
    rows. A match counts 1, and any other pair (N - 1) / (M - 1), which gives the mean over the batches that
    could be drawn. A plain sum over thousands of rows can outweigh the matches, and drive queries from all.

    Attributes:
        logit_scale, logit_bias: scalars, or (1,); log inverse temperature, and what is added to each logit.
    """

    logit_scale: Tensor
    logit_bias: Tensor
    gallery: Gallery | None = None

    def __call__(self, images: Tensor, texts: Tensor, image_ids: Tensor, caption_ids: Tensor) -> Tensor:
        logits, matches = self._compared(images, texts, image_ids, caption_ids)
        logits = logits + self.logit_bias.to(logits.dtype)
        rows, columns = logits.shape
        signs = torch.full_like(logits, -1).scatter_(1, matches[:, None], 1)
        share = (rows - 1) / max(1, columns - 1)  # 1 in a batch
        weights = torch.full_like(logits, share).scatter_(1, matches[:, None], 1)
        return -(weights * F.logsigmoid(signs * logits)).sum() / rows

    def _compared(
        self, images: Tensor, texts: Tensor, image_ids: Tensor, caption_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(N, M) scaled cosines, -inf where a pair is neither match nor negative; (N,) columns of matches."""
        gallery, scale = self.gallery, self.logit_scale
        if gallery is not None and gallery.of == "images":
            return gallery.logits(texts, caption_ids, image_ids, scale)
        if gallery is not None:
            return gallery.logits(images, image_ids, caption_ids, scale)
        device = images.device
        logits = _scaled_cosines(images, texts, scale)
        left_out = false_negatives(queued(image_ids, device), queued(caption_ids, device))
        return logits.masked_fill(left_out, float("-inf")), torch.arange(len(logits), device=device)


def one_way_losses(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    image_ids: Tensor,
    caption_ids: Tensor,
) -> tuple[Tensor, Tensor]:
    """InfoNCE over a batch of pairs: of each image among the captions, and of each caption among the images.

    Args:
        image_features: (N, D), any norm.
        text_features: (N, D), any norm.
        logit_scale: scalar log inverse temperature.
        image_ids: (N,) equal for the same image.
        caption_ids: (N,) equal for the same caption text.

    Returns:
        Two scalars of at least fp32: image to text, text to image.
    """
    logits = _scaled_cosines(image_features, text_features, logit_scale)
    logits = logits.masked_fill(false_negatives(image_ids, caption_ids), float("-inf"))
    labels = torch.arange(len(logits), device=logits.device)
    return F.cross_entropy(logits, labels), F.cross_entropy(logits.T, labels)


def _scaled_cosines(images: Tensor, texts: Tensor, logit_scale: Tensor) -> Tensor:
    wide = torch.promote_types(images.dtype, torch.float32)
    unit_images, unit_texts = F.normalize(images.to(wide), dim=-1), F.normalize(texts.to(wide), dim=-1)
    return logit_scale.to(wide).exp() * unit_images @ unit_texts.T


def false_negatives(image_ids: Tensor, caption_ids: Tensor) -> Tensor:
    """(N, N) True where two different pairs share the image or the caption."""
    same = (image_ids[:, None] == image_ids) | (caption_ids[:, None] == caption_ids)
    return same.fill_diagonal_(False)
