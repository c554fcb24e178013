"""Tip-Adapter and Tip-Adapter-F: the labelled images as a cache beside the class texts.

Zhang et al. 2022, *Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification*
(arXiv:2207.09519), with the residual ratio 1 and the sharpness 5.5 that the paper gives as its own, and
without the search that it makes for them on further labelled images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgraft.train.fewshot.args import FeatureModeArgs
from clipgraft.train.fewshot.features import (
    Classifier,
    FewShotFeatures,
    LinearClassifier,
    zero_shot,
)
from clipgraft.train.fewshot.steps import take_steps

_EPOCHS, _LR, _EPS, _BATCH = 20, 1e-3, 1e-4, 256


@dataclass(frozen=True, eq=False)
class CacheClassifier:
    """Zero-shot logits, and for each cached image alpha · exp(-beta · (1 - cosine)) for its class.

    Attributes:
        texts: what zero-shot classification answers.
        keys: fp32 (N, D) cached features.
        values: fp32 (N, C), 1 where a cached image has the class.
        alpha, beta: weight and sharpness of the cache.
    """

    texts: LinearClassifier
    keys: Tensor
    values: Tensor
    alpha: float
    beta: float
    trained_weights: int = 0

    def logits(self, images: Tensor) -> Tensor:
        """fp32 (n, E) -> (n, C)."""
        return self.unit_logits(self.texts.projection.unit(images))

    def unit_logits(self, features: Tensor) -> Tensor:
        """fp32 (n, D) features of norm 1 -> (n, C)."""
        near = torch.exp(-self.beta * (1 - features @ self.keys.T))
        return self.texts.unit_logits(features) + self.alpha * near @ self.values


class TipAdapter:
    """Nothing trains: a cached image is the mean of its views."""

    name = "tip-adapter"

    def fit(self, features: FewShotFeatures, options: FeatureModeArgs, seed: int) -> CacheClassifier:
        """Put the images into the cache; `seed` plays no part."""
        keys = F.normalize(features.unit().mean(0), dim=-1)
        values = F.one_hot(features.labels, len(features.classes)).float()
        return CacheClassifier(
            zero_shot(features), keys, values, options.cache_weight, options.cache_sharpness
        )


class TipAdapterF:
    """The cached features train, starting as Tip-Adapter: AdamW, 20 epochs, as the paper has it."""

    name = "tip-adapter-f"

    def fit(self, features: FewShotFeatures, options: FeatureModeArgs, seed: int) -> Classifier:
        """Train the keys by cross-entropy; class texts, labels, alpha and beta stay."""
        start = TipAdapter().fit(features, options, seed)
        epochs = _EPOCHS if options.feature_epochs is None else options.feature_epochs
        keys = start.keys.clone().requires_grad_()
        training = _with_keys(start, keys)

        def loss(batch: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(training.unit_logits(batch), labels)

        optimizer = torch.optim.AdamW([keys], lr=options.feature_lr or _LR, eps=_EPS)
        take_steps(
            optimizer,
            loss,
            features.unit(),
            features.labels,
            epochs=epochs,
            seed=seed,
            batch_size=_BATCH,
        )
        return _with_keys(start, keys.detach())


def _with_keys(start: CacheClassifier, keys: Tensor) -> CacheClassifier:
    return CacheClassifier(start.texts, keys, start.values, start.alpha, start.beta, keys.numel())
