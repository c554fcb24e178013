"""Learn to agree with a larger model on pairs; its features are known before training begins."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgraft.data.datasets import Pairs
from clipgraft.data.features import encode_captions
from clipgraft.engine.encoder import Encoder
from clipgraft.errors import ConfigError
from clipgraft.models.clip import Clip
from clipgraft.models.device import queued
from clipgraft.train.args import DistillArgs
from clipgraft.train.feed import MicroBatch
from clipgraft.train.gradient_cache import Encode, Loss
from clipgraft.train.inputs import Inputs
from clipgraft.train.recipes.contrastive import ContrastiveRecipe, contrastive, require_contrast
from clipgraft.train.recipes.recipe import Objective

log = logging.getLogger("clipgraft")


class DistillationRecipe(ContrastiveRecipe):
    """The contrastive loss of pairs, and agreement with a teacher's features and similarities.

    The teacher runs once over images and captions, as it is when training begins, and never again.
    """

    has_base = False

    def __init__(self, teacher: Clip, pairs: Pairs, val: Pairs | None, weights: DistillArgs) -> None:
        super().__init__(pairs, val)
        self.teacher = teacher
        self.weights = weights

    def check(self) -> None:
        weights = self.weights
        if not (weights.contrastive or weights.feature or weights.similarity):
            raise ConfigError("`contrastive`, `feature` and `similarity` are all 0: one of them must count")
        if not weights.feature and not weights.similarity:
            require_contrast(self.pairs)

    def settings(self) -> dict[str, Any]:
        return {
            **super().settings(),
            "teacher": self.teacher.fingerprint,
            "weights": self.weights.model_dump(),
        }

    def objective(self, inputs: Inputs) -> Objective:
        log.info("the teacher encodes each image and caption once")
        encoder = Encoder(self.teacher, inputs.setup.autocast)
        images = inputs.encode_images(self.pairs.images, encoder)
        texts = inputs.encode_captions(inputs.feed.captions, encoder)
        taught = Teacher(images, texts, float(self.teacher.logit_scale.detach()))
        if self.weights.feature:
            _check_sizes(inputs, images)
        return Distilled(contrastive(inputs), taught, self.weights, inputs.setup.clip.logit_scale)


@dataclass(frozen=True)
class Teacher:
    """What a frozen teacher says of the training data.

    Attributes:
        images: (images, D) unit-norm.
        texts: (distinct captions, D) unit-norm, in the order of `Feed.captions`.
        logit_scale: its log inverse temperature.
    """

    images: Tensor
    texts: Tensor
    logit_scale: float


@dataclass(frozen=True)
class Distilled:
    """The loss of another objective on the pairs, and agreement with a teacher.

    Attributes:
        pairs: gives the parts of a batch, and the contrastive loss.
        logit_scale: of the student.
    """

    pairs: Objective
    teacher: Teacher
    weights: DistillArgs
    logit_scale: Tensor

    def parts(self, batch: Sequence[MicroBatch]) -> list[Encode]:
        return self.pairs.parts(batch)

    def loss(self, batch: Sequence[MicroBatch]) -> Loss:
        of_pairs = self.pairs.loss(batch)
        taught_images = self.teacher.images[torch.cat([part.image_ids for part in batch])]
        taught_texts = self.teacher.texts[torch.cat([part.caption_ids for part in batch])]
        weights = self.weights

        def loss(images: Tensor, texts: Tensor) -> Tensor:
            wanted = queued(taught_images, images.device), queued(taught_texts, images.device)
            total = images.new_zeros((), dtype=torch.promote_types(images.dtype, torch.float32))
            if weights.contrastive:
                total = total + weights.contrastive * of_pairs(images, texts)
            if weights.feature:
                distance = feature_distance(images, wanted[0]) + feature_distance(texts, wanted[1])
                total = total + weights.feature * distance / 2
            if weights.similarity:
                scale = torch.full((), self.teacher.logit_scale, device=images.device)
                given = images, texts, self.logit_scale
                total = total + weights.similarity * similarity_divergence(given, (*wanted, scale))
            return total

        return loss


def feature_distance(features: Tensor, wanted: Tensor) -> Tensor:
    """Mean cosine distance of rows, (N, D) of any norm each; half the squared distance of unit features.

    Up to a factor this is feature distillation of CLIP-KD (Yang et al. 2023, arXiv:2307.12732).
    """
    return 1 - F.cosine_similarity(features.float(), wanted.float(), dim=-1).mean()


def similarity_divergence(
    student: tuple[Tensor, Tensor, Tensor], teacher: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """KL divergence of the student's similarities from the teacher's, the mean of both directions.

    Each row of a batch's logits is a distribution over the other tower's rows, at the model's own
    temperature. CLIP-KD (Yang et al. 2023, arXiv:2307.12732) calls it contrastive relational distillation,
    TinyCLIP (Wu et al. 2023, arXiv:2309.12314) affinity mimicking.

    Args:
        student, teacher: (N, D) image features, (N, D) text features of any norm, scalar log inverse
            temperature. Dimensions may differ between the two.

    Returns:
        Scalar of at least fp32, per row.
    """
    given, wanted = _logits(*student), _logits(*teacher).detach()
    return (_divergence(given, wanted) + _divergence(given.T, wanted.T)) / 2


def _logits(images: Tensor, texts: Tensor, logit_scale: Tensor) -> Tensor:
    unit_images, unit_texts = F.normalize(images.float(), dim=-1), F.normalize(texts.float(), dim=-1)
    return logit_scale.float().exp() * unit_images @ unit_texts.T


def _divergence(given: Tensor, wanted: Tensor) -> Tensor:
    logs = F.log_softmax(given, dim=-1), F.log_softmax(wanted, dim=-1)
    return F.kl_div(*logs, reduction="batchmean", log_target=True)


def _check_sizes(inputs: Inputs, wanted: Tensor) -> None:
    own = encode_captions(inputs.setup.clip, [""], encoder=inputs.encoder).shape[1]
    if own != wanted.shape[1]:
        raise ConfigError(
            f"the student's features have {own} numbers and the teacher's {wanted.shape[1]}: "
            "give `feature=0` and let their similarities agree"
        )
