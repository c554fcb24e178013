"""Which caption a model finds nearest to each image, and which wrong image to each caption."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clipgraft.errors import DataError
from clipgraft.evaluate.ranks import RetrievalRanks

_SCORES = 1 << 24  # in one block


@dataclass(frozen=True, eq=False)
class CaptionAnswers:
    """What a model answers for N images, on the CPU.

    Attributes:
        nearest: int64 (N,): the best own caption where it is first, otherwise the nearest wrong one.
        score: float32 (N,): its inner product with the image.
        rank: int64 (N,): of the best own caption, from 1.
    """

    nearest: Tensor
    score: Tensor
    rank: Tensor


def caption_answers(
    images: Tensor, texts: Tensor, image_of_text: Tensor, ranks: RetrievalRanks
) -> CaptionAnswers:
    """Find the answer for each image, from unit-norm (N, D) and (M, D).

    `ranks` are those of the same features; every image has a caption.
    """
    texts, owner = texts.float(), image_of_text.to(images.device)
    texts = texts.to(images.device)
    first, step = ranks.image_to_text.to(images.device) == 1, max(1, _SCORES // len(texts))
    nearest, score = list[Tensor](), list[Tensor]()
    for start in range(0, len(images), step):
        some = images[start : start + step].float() @ texts.T
        numbers = torch.arange(start, start + len(some), device=images.device)
        own = owner[None] == numbers[:, None]
        some.masked_fill_(own != first[numbers][:, None], -torch.inf)
        best = some.max(1)
        nearest.append(best.indices.cpu())
        score.append(best.values.cpu())
    return CaptionAnswers(torch.cat(nearest), torch.cat(score), ranks.image_to_text.cpu())


@dataclass(frozen=True, eq=False)
class ImageAnswers:
    """What a model answers for M captions, on the CPU.

    Attributes:
        rank: int64 (M,): of the caption's image, from 1.
        own: float32 (M,): inner product of the caption and its image.
        nearest: int64 (M,): the nearest of the other images.
        score: float32 (M,): inner product of the caption and that one.
    """

    rank: Tensor
    own: Tensor
    nearest: Tensor
    score: Tensor


def image_answers(
    images: Tensor, texts: Tensor, image_of_text: Tensor, ranks: RetrievalRanks
) -> ImageAnswers:
    """Find the answer for each caption, from unit-norm (N, D) and (M, D).

    `ranks` are those of the same features.

    Raises:
        DataError: there is only one image.
    """
    if len(images) < 2:
        raise DataError("one image has no wrong ones beside it: pass two images or more")
    gallery, owner = images.float(), image_of_text.to(images.device)
    step = max(1, _SCORES // len(images))
    own, nearest, score = list[Tensor](), list[Tensor](), list[Tensor]()
    for start in range(0, len(texts), step):
        some = texts[start : start + step].to(images.device).float() @ gallery.T
        right = owner[start : start + step, None]
        own.append(some.gather(1, right)[:, 0].cpu())
        best = some.scatter_(1, right, -torch.inf).max(1)
        nearest.append(best.indices.cpu())
        score.append(best.values.cpu())
    return ImageAnswers(ranks.text_to_image.cpu(), torch.cat(own), torch.cat(nearest), torch.cat(score))
