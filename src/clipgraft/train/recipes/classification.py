"""Learn to tell classes apart: cross-entropy over the prompts of the classes, or over a head."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipgraft.data.datasets import Labelled, Pairs
from clipgraft.data.features import encode_captions
from clipgraft.data.retained import Retained
from clipgraft.errors import ConfigError, DataError
from clipgraft.evaluate.bootstrap import Measured
from clipgraft.evaluate.classification import (
    class_features,
    classification_metrics,
    measure_classification,
    pool_prompts,
    prompt_weights,
)
from clipgraft.evaluate.head import Head, save_head
from clipgraft.models.clip import Clip
from clipgraft.models.device import queued
from clipgraft.train.args import HeadArgs, LossKind
from clipgraft.train.feed import FeatureSource, MicroBatch, trains
from clipgraft.train.gradient_cache import Encode, Features, Loss
from clipgraft.train.inputs import Inputs
from clipgraft.train.recipes.recipe import Objective, Recipe

log = logging.getLogger("clipgraft")


class ClassificationRecipe(Recipe):
    """Tell images apart by class: by prompts that are encoded at every step, or by a head on features.

    Attributes:
        data, val_data: labelled images of the same classes.
        prompts: one or more of each class, in the order of the classes.
    """

    unit = "images"
    head: Head | None

    def __init__(
        self,
        data: Labelled,
        val: Labelled | None,
        prompts: Sequence[Sequence[str]],
        options: HeadArgs,
        retained: Retained | None = None,
    ) -> None:
        super().__init__(_named(data), None if val is None else _named(val), retained)
        self.data, self.val_data = data, val
        self.prompts = prompts
        self.options = options
        self.needs_tower = options.head == "prompts"

    def check(self) -> None:
        if len(self.prompts) != len(self.data.classes) or not all(self.prompts):
            raise DataError(
                f"{sum(1 for group in self.prompts if group)} of {len(self.data.classes)} classes have a "
                "prompt: give each class one or more, in the order of the classes"
            )
        if self.val_data is not None and self.val_data.classes != self.data.classes:
            others = sorted(set(self.val_data.classes) ^ set(self.data.classes))
            raise DataError(
                f"training and validation images are of different classes, {', '.join(others[:4])}: use the "
                "same classes in both"
            )
        require_classes(self.data)

    def choose_loss(self, clip: Clip, asked: LossKind | Literal["auto"]) -> LossKind:
        return class_loss(asked)

    def check_model(self, clip: Clip) -> None:
        kind = self.options.head
        if kind != "prompts" and trains(clip, "text"):
            raise ConfigError(
                f"`head={kind}` reads no texts, but the text tower is to train: adapt image sites alone "
                "(`targets=vision-attention`), add `lock_text`, or use `head=prompts`"
            )

    def settings(self) -> dict[str, Any]:
        known = digest_of(self.data, self.prompts, self.options.weights)
        return {"head": self.options.head, "data": known}

    def sample(self) -> Pairs:
        """Each image with the prompts of its class."""
        return Pairs(self.data.images, tuple(tuple(self.prompts[label]) for label in self.data.labels))

    def objective(self, inputs: Inputs) -> Objective:
        clip, kind = inputs.setup.clip, self.options.head
        classes = torch.tensor([self.data.classes.index(name) for name in inputs.feed.captions])
        weights = None if self.options.weights is None else torch.tensor(list(self.options.weights))
        if kind == "prompts":
            counts = [len(group) for group in self.prompts]
            shares = prompt_weights(self.prompts)
            return Prompted(
                clip, inputs.images, self._prompt_features(inputs), counts, classes, weights, shares
            )
        scale = float(clip.logit_scale.detach().exp())
        self.head = Head(kind, self._prototypes(inputs), scale).to(clip.device)
        return Headed(clip, inputs.images, self.head, classes, weights)

    def measure(self, inputs: Inputs) -> Measured:
        assert self.val_data is not None
        val, head, world = self.val_data, self.head, inputs.setup.world
        images = inputs.val_features(val.images)

        def by_head(head: Head) -> Measured:
            with torch.no_grad():
                logits = head(images.to(head.weight.device))
            return classification_metrics(logits, torch.tensor(val.labels), val.classes).measured

        if head is not None:
            return world.on_rank0(lambda: by_head(head))
        prototypes = self._prototypes(inputs)
        return world.on_rank0(
            lambda: measure_classification(inputs.encoder, val, self.prompts, images, prototypes).measured
        )

    def save(self, folder: Path) -> None:
        if self.head is not None:
            save_head(self.head, self.data.classes, folder / "head")

    def _prompt_features(self, inputs: Inputs) -> Callable[[], Tensor] | None:
        """This process's share of all prompts, as (P, D) features: computed at every call if the text tower
        trains, else once."""
        everywhere = [text for group in self.prompts for text in group]
        texts = everywhere[inputs.setup.world.share(len(everywhere))]
        if not texts:
            return None
        encoder = inputs.encoder
        if trains(encoder.clip, "text"):
            tokens = encoder.clip.tokenize(texts)
            return lambda: encoder.encode_text(tokens)
        log.info("the text tower is frozen: each prompt is encoded once")
        features = encode_captions(encoder.clip, texts, encoder=encoder)
        return lambda: features

    def _prototypes(self, inputs: Inputs) -> Tensor:
        """Unit-norm features of classes, (C, D) on the CPU, as `class_features` gives them."""
        if inputs.setup.world.alone:
            return class_features(inputs.encoder, self.prompts)
        features = inputs.encode_captions([text for group in self.prompts for text in group])
        return pool_prompts(features, [len(group) for group in self.prompts], prompt_weights(self.prompts))


def digest_of(
    data: Labelled, prompts: Sequence[Sequence[str]], weights: Sequence[float] | None = None
) -> str:
    """Return 16 hex digits of what labelled images are, by names, labels and prompts.

    `weights`: of the classes in the loss.
    """
    shares = prompt_weights(prompts)
    weighted = () if shares is None else (shares.tolist(),)
    listed = None if weights is None else list(weights)
    known = repr((data.classes, [*map(tuple, prompts)], listed, *weighted))
    digest = hashlib.sha256(known.encode())
    for image, label in zip(data.images, data.labels, strict=True):
        digest.update(f"{image.name}\t{label}\n".encode(errors="surrogatepass"))
    return digest.hexdigest()[:16]


def class_loss(asked: LossKind | Literal["auto"]) -> LossKind:
    """Softmax, with any model: an image has one class, and is given the one with the largest logit.

    A `logit_bias` is the same for all classes and plays no part.

    Raises:
        ConfigError: `sigmoid` is asked for.
    """
    if asked == "sigmoid":
        raise ConfigError(
            "`loss=sigmoid` is for pairs: classes exclude each other and are learnt by cross-entropy; drop it"
        )
    return "softmax"


def require_classes(train: Labelled) -> None:
    """Refuse labelled images of one class: any classifier is always right, and the loss is 0.0 at every step.

    Raises:
        DataError: naming the class.
    """
    present = set(train.labels)
    if len(train.classes) < 2:
        raise DataError(
            f"nothing to learn: all {len(train):,} images are of one class, {train.classes[0]!r}; check the "
            "label column (`csv_label_key`), or give images of another class"
        )
    if len(present) == 1:
        log.warning(
            "all %d training images are of one class, %s of %d: the model learns to answer nothing else",
            len(train),
            train.classes[next(iter(present))],
            len(train.classes),
        )


def _named(data: Labelled) -> Pairs:
    """Each image with the name of its class for a caption."""
    return Pairs(data.images, tuple((data.classes[label],) for label in data.labels))


@dataclass(frozen=True)
class Prompted:
    """Images told apart by class: cross-entropy over the classes' prompts.

    Prompts are encoded once a step, as a part of their own, and not at all if their features are fixed; each
    of several processes encodes a share of them.

    Attributes:
        images: what the image tower gives for a micro-batch.
        prompts: () -> (P, D) features of all prompts, class by class, any norm; of several processes, this
            one's share; None if it has none.
        counts: how many prompts each class has.
        class_of_caption: (captions,) the class that a caption id stands for.
        weights: (C,) of the classes in the loss, or None.
        prompt_weights: (P,) of all prompts in the means of their classes, or None.
    """

    clip: Clip
    images: FeatureSource
    prompts: Callable[[], Tensor] | None
    counts: Sequence[int]
    class_of_caption: Tensor
    weights: Tensor | None = None
    prompt_weights: Tensor | None = None

    def parts(self, batch: Sequence[MicroBatch]) -> list[Encode]:
        images = _images_alone(self.clip, self.images, batch)
        if self.prompts is None:
            return images
        texts = partial(self._encode_prompts, self.prompts)
        return [partial(_together, texts, images[0])] if len(images) == 1 else [texts, *images]

    def _encode_prompts(self, prompts: Callable[[], Tensor]) -> Features:
        texts = queued(prompts(), self.clip.device)
        return texts.new_empty(0, texts.shape[1]), texts

    def loss(self, batch: Sequence[MicroBatch]) -> Loss:
        labels = torch.cat([self.class_of_caption[part.caption_ids] for part in batch])

        def loss(images: Tensor, texts: Tensor) -> Tensor:
            shares = None if self.prompt_weights is None else queued(self.prompt_weights, texts.device)
            prototypes = pool_prompts(F.normalize(texts.float(), dim=-1), self.counts, shares)
            scale = self.clip.logit_scale.float().exp()
            logits = scale * F.normalize(images.float(), dim=-1) @ prototypes.T
            weights = None if self.weights is None else queued(self.weights, logits.device).to(logits)
            return F.cross_entropy(logits, queued(labels, logits.device), weight=weights)

        return loss


@dataclass(frozen=True)
class Headed:
    """Images told apart by a classifier on their features (`Head`); texts play no part."""

    clip: Clip
    images: FeatureSource
    head: nn.Module
    class_of_caption: Tensor
    weights: Tensor | None = None

    def parts(self, batch: Sequence[MicroBatch]) -> list[Encode]:
        return _images_alone(self.clip, self.images, batch)

    def loss(self, batch: Sequence[MicroBatch]) -> Loss:
        labels = torch.cat([self.class_of_caption[part.caption_ids] for part in batch])

        def loss(images: Tensor, texts: Tensor) -> Tensor:
            weights = None if self.weights is None else queued(self.weights, images.device)
            logits: Tensor = self.head(images)
            return F.cross_entropy(logits, queued(labels, images.device), weight=weights)

        return loss


def _together(texts: Encode, images: Encode) -> Features:
    """Both at once: a step of one micro-batch then runs each tower once, not once more for its gradients."""
    encoded = texts()[1]
    return images()[0], encoded


def _images_alone(clip: Clip, images: FeatureSource, batch: Sequence[MicroBatch]) -> list[Encode]:
    """Parts that bring no texts."""

    def encode(part: MicroBatch) -> Features:
        features = queued(images(part), clip.device)
        return features, features.new_empty(0, features.shape[1])

    return [partial(encode, part) for part in batch]
