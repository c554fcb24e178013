"""Features of a few labelled images of each class, and what makes a classifier of them.

A feature mode leaves both towers alone: it sees each image once, as what the image tower gives before its
final projection, and trains in seconds, without the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgraft.data.args import FeatureArgs
from clipgraft.data.datasets import Labelled
from clipgraft.data.feature_cache import open_cache
from clipgraft.data.feature_key import vision_lora_is_active
from clipgraft.data.features import encode_images, image_rows
from clipgraft.data.loading import SeededView, Transform
from clipgraft.data.stored_rows import RowKind
from clipgraft.engine.encoder import Encoder
from clipgraft.errors import ConfigError, DataError
from clipgraft.lora.state import lora_state
from clipgraft.models.clip import Clip
from clipgraft.models.device import use_autocast
from clipgraft.train.fewshot.args import FeatureModeArgs

BEFORE_PROJECTION = "input of the vision projection"


@dataclass(frozen=True, eq=False)
class Projection:
    """The last linear map of an image tower.

    Attributes:
        weight: fp32 (D, E); None where the tower has none, so that D = E.
        bias: fp32 (D,), or None.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None

    def unit(self, images: Tensor) -> Tensor:
        """(..., E) what the tower gives before it -> (..., D) features of norm 1."""
        projected = images if self.weight is None else F.linear(images, self.weight, self.bias)
        return F.normalize(projected, dim=-1)


@dataclass(frozen=True, eq=False)
class FewShotFeatures:
    """Labelled training images and class texts as features; every class has an image.

    Attributes:
        views: fp32 (V, N, E) on the CPU: what the image tower gives before its final projection, for V
            augmented views of N images.
        labels: int64 (N,), indices into `classes`.
        texts: fp32 (C, D), unit norm: the pooled prompts of each class.
        classes: C names.
        logit_scale: what cosines are multiplied by, about 100 in CLIP.
        projection: the image tower's last linear map.

    Raises:
        DataError: shapes do not fit, a label is out of range, a class has no image, or a value is not finite.
    """

    views: Tensor
    labels: Tensor
    texts: Tensor
    classes: tuple[str, ...]
    logit_scale: float
    projection: Projection = Projection()

    def __post_init__(self) -> None:
        _check_shapes(self)
        _check_labels(self.labels, self.classes)
        for name, values in (("image features", self.views.flatten(0, 1)), ("class texts", self.texts)):
            broken = (~values.isfinite()).any(-1).nonzero()
            if len(broken):
                raise DataError(
                    f"{name}: NaN or infinity in {len(broken)} of {len(values)} rows (first: row "
                    f"{int(broken[0])}): the model overflowed; encode in fp32 or bf16"
                )

    @property
    def shots(self) -> float:
        """Images a class, on average."""
        return len(self.labels) / len(self.classes)

    def unit(self) -> Tensor:
        """(V, N, D) features of norm 1, as the base projects them."""
        return self.projection.unit(self.views)


class Classifier(Protocol):
    """Tells classes apart by what the image tower gives before its final projection."""

    @property
    def trained_weights(self) -> int:
        """How many numbers training changed."""

    def logits(self, images: Tensor) -> Tensor:
        """fp32 (n, E) as `FewShotFeatures.views` -> (n, C)."""


class FeatureMode(Protocol):
    """One way to make a classifier of a few features; the same seed gives the same bits."""

    name: str

    def fit(self, features: FewShotFeatures, options: FeatureModeArgs, seed: int) -> Classifier:
        """Train on the features alone, with fixed settings: nothing is chosen on other data."""


@dataclass(frozen=True, eq=False)
class LinearClassifier:
    """Products of unit-norm features with one vector a class.

    Attributes:
        projection: fp32, the image tower's last map.
        weights: fp32 (C, D); of unit norm where nothing trained them.
        logit_scale: what products are multiplied by.
        trained_weights: how many numbers training changed.
    """

    projection: Projection
    weights: Tensor
    logit_scale: float
    trained_weights: int = 0

    def logits(self, images: Tensor) -> Tensor:
        """fp32 (n, E) -> (n, C)."""
        return self.unit_logits(self.projection.unit(images))

    def unit_logits(self, features: Tensor) -> Tensor:
        """fp32 (n, D) features of norm 1 -> (n, C)."""
        return self.logit_scale * features @ self.weights.T


def zero_shot(features: FewShotFeatures) -> LinearClassifier:
    """Return the classifier that knows the class texts alone."""
    return LinearClassifier(features.projection, features.texts, features.logit_scale)


def few_shot_features(
    clip: Clip,
    data: Labelled,
    texts: Tensor,
    features: FeatureArgs | None = None,
    *,
    views: int = 1,
    seed: int = 0,
    batch_size: int = 64,
) -> FewShotFeatures:
    """Encode labelled images for the feature modes.

    Args:
        clip: the model; an active adapter acts.
        data: the few images.
        texts: unit-norm fp32 (C, D) features of the classes, as `class_features` gives them.
        features: how images become features, and where those are kept.
        views: 1: each image as it is; more: as many random crops of it.
        seed: of the crops.
        batch_size: images encoded at once.

    Raises:
        ConfigError: several views of a base that brings no augmenting transform.
        DataError: as `FewShotFeatures`; an image cannot be used.
    """
    transforms: list[Transform | None] = [None]
    if views > 1:
        if clip.preprocess_train is None:
            raise ConfigError("`views`: this base brings no augmenting transform; use one view")
        transforms = [SeededView(clip.preprocess_train, seed, view) for view in range(views)]
    encoded = [
        tower_features(clip, data.images, features, batch_size=batch_size, transform=transform)
        for transform in transforms
    ]
    return FewShotFeatures(
        torch.stack(encoded),
        torch.tensor(data.labels),
        texts,
        tuple(data.classes),
        float(clip.logit_scale.detach().float().exp()),
        projection_of(clip),
    )


def projection_of(clip: Clip) -> Projection:
    """Return the image tower's last linear map, an active adapter in it, as fp32 on the CPU.

    A tower without one, or one that runs its own forward, has the identity for it.
    """
    part = Encoder(clip).vision_projection
    if part is None:
        return Projection()
    state = lora_state(clip)
    adapter = None if state is None else state.in_effect
    layer = None if adapter is None else adapter.layers.get(part.site)
    weight, bias = part.matrix.detach().float(), part.bias
    if layer is None:
        return Projection(weight.cpu(), None if bias is None else bias.detach().float().cpu())
    if layer.lora_bias is not None:
        bias = layer.lora_bias if bias is None else bias + layer.lora_bias
    folded = layer.folded(weight).detach()
    return Projection(folded.cpu(), None if bias is None else bias.detach().float().cpu())


def tower_features(
    clip: Clip,
    images: Sequence[Path],
    features: FeatureArgs | None = None,
    *,
    batch_size: int = 64,
    transform: Transform | None = None,
) -> Tensor:
    """Encode image files up to the projection that `projection_of` gives: fp32 (N, E) on the CPU.

    A tower that runs its own forward, or is a table of features, gives unit-norm features instead.
    """
    features = features or FeatureArgs()
    encoder = Encoder(clip, use_autocast(features.autocast, clip.device))
    if encoder.vision_projection is None:
        return encode_images(
            clip, images, features, batch_size=batch_size, encoder=encoder, transform=transform
        )
    rows = image_rows(
        clip,
        images,
        encoder.encode_to_projection,
        features.replace(autocast=encoder.autocast),
        RowKind(BEFORE_PROJECTION),
        batch_size=batch_size,
        transform=transform,
        cache=None if vision_lora_is_active(clip) else open_cache(features),
        label=BEFORE_PROJECTION,
    )
    return rows.tensor().float()


def _check_shapes(features: FewShotFeatures) -> None:
    views, texts, weight = features.views, features.texts, features.projection.weight
    if views.ndim != 3 or texts.ndim != 2 or features.labels.shape != views.shape[1:2]:
        raise DataError(
            f"views {tuple(views.shape)}, labels {tuple(features.labels.shape)} and texts "
            f"{tuple(texts.shape)} do not fit: pass (V, N, E), (N,) and (C, D)"
        )
    if len(texts) != len(features.classes):
        raise DataError(f"texts of {len(texts)} classes for {len(features.classes)} class names")
    wanted = (texts.shape[1], views.shape[2])
    given = (views.shape[2],) * 2 if weight is None else tuple(weight.shape)
    if given != wanted:
        raise DataError(f"the projection is {given}, but images and texts need {wanted}")


def _check_labels(labels: Tensor, classes: Sequence[str]) -> None:
    if not len(labels) or int(labels.min()) < 0 or int(labels.max()) >= len(classes):
        span = f"{int(labels.min())} to {int(labels.max())}" if len(labels) else "nothing to nothing"
        raise DataError(f"labels run from {span}, outside 0..{len(classes) - 1}")
    counts = torch.bincount(labels, minlength=len(classes))
    empty = [name for name, count in zip(classes, counts.tolist(), strict=True) if not count]
    if empty:
        shown = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        raise DataError(
            f"{len(empty)} of {len(classes)} classes have no training image: {shown}; add images, or leave "
            "the classes out"
        )
