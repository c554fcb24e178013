"""The contrastive objective (Radford et al. 2021, arXiv:2103.00020, figure 3), without false negatives."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    image_ids: Tensor,
    caption_ids: Tensor,
) -> Tensor:
    """Symmetric InfoNCE over a batch of pairs: the mean of both `one_way_losses`."""
    to_text, to_image = one_way_losses(image_features, text_features, logit_scale, image_ids, caption_ids)
    return (to_text + to_image) / 2


def one_way_losses(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    image_ids: Tensor,
    caption_ids: Tensor,
) -> tuple[Tensor, Tensor]:
    """InfoNCE over a batch of pairs: of each image among the captions, and of each caption among the images.

    Two pairs of the same image, or with the same caption, are no negatives of each other: their logits are
    left out of the softmax, so that a batch with several captions of one image is not told to push them
    apart.

    Args:
        image_features: (N, D), any norm.
        text_features: (N, D), any norm.
        logit_scale: scalar log inverse temperature.
        image_ids: (N,) equal for the same image.
        caption_ids: (N,) equal for the same caption text.

    Returns:
        Two scalars of at least fp32: image to text, text to image.
    """
    images = F.normalize(image_features.float(), dim=-1)
    texts = F.normalize(text_features.float(), dim=-1)
    logits = logit_scale.float().exp() * images @ texts.T
    logits = logits.masked_fill(false_negatives(image_ids, caption_ids), float("-inf"))
    labels = torch.arange(len(logits), device=logits.device)
    return F.cross_entropy(logits, labels), F.cross_entropy(logits.T, labels)


def false_negatives(image_ids: Tensor, caption_ids: Tensor) -> Tensor:
    """(N, N) True where two different pairs share the image or the caption."""
    same = (image_ids[:, None] == image_ids) | (caption_ids[:, None] == caption_ids)
    return same.fill_diagonal_(False)
