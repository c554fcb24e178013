"""Which caption a model finds nearest to each image, and how far down the image's own is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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
