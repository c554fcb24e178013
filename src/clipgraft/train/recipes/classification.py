"""Learn to tell classes apart: cross-entropy over the prompts of the classes, or over a head."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipgraft.data.datasets import Labelled, Pairs
from clipgraft.engine.encoder import Encoder
from clipgraft.errors import ConfigError, DataError
from clipgraft.evaluate.bootstrap import Measured
from clipgraft.evaluate.classification import (
    ClassificationResult,
    class_features,
    classification_metrics,
    evaluate_classification,
    pool_prompts,
)
from clipgraft.models.clip import Clip
from clipgraft.train.args import HeadArgs
from clipgraft.train.classes import Head, save_head
from clipgraft.train.feature_sources import trains
from clipgraft.train.inputs import Inputs
from clipgraft.train.objectives import Headed, Objective, Prompted
from clipgraft.train.recipes.recipe import Recipe

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
        self, data: Labelled, val: Labelled | None, prompts: Sequence[Sequence[str]], options: HeadArgs
    ) -> None:
        super().__init__(_named(data), None if val is None else _named(val))
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

    def check_model(self, clip: Clip) -> None:
        kind = self.options.head
        if kind != "prompts" and trains(clip, "text"):
            raise ConfigError(
                f"`head={kind}` reads no texts, but the text tower is to train: adapt image sites alone "
                "(`targets=vision-attention`), add `lock_text`, or use `head=prompts`"
            )

    def settings(self) -> dict[str, Any]:
        return {"head": self.options.head, "data": self._digest()}

    def sample(self) -> Pairs:
        """Each image with the prompts of its class."""
        return Pairs(self.data.images, tuple(tuple(self.prompts[label]) for label in self.data.labels))

    def objective(self, inputs: Inputs) -> Objective:
        clip, kind = inputs.setup.clip, self.options.head
        classes = torch.tensor([self.data.classes.index(name) for name in inputs.feed.captions])
        weights = None if self.options.weights is None else torch.tensor(list(self.options.weights))
        if kind == "prompts":
            counts = [len(group) for group in self.prompts]
            return Prompted(clip, inputs.images, self._prompt_features(inputs), counts, classes, weights)
        scale = float(clip.logit_scale.detach().exp())
        self.head = Head(kind, self._prototypes(inputs), scale).to(clip.device)
        return Headed(clip, inputs.images, self.head, classes, weights)

    def measure(self, inputs: Inputs) -> Measured:
        assert self.val_data is not None
        val, head, world = self.val_data, self.head, inputs.setup.world
        images = inputs.val_features(val.images)
        if head is not None:
            return world.on_rank0(lambda: _judge_head(head, images, val).measured)
        prototypes = self._prototypes(inputs)
        return world.on_rank0(lambda: self._judge(inputs.encoder, images, prototypes).measured)

    def save(self, folder: Path) -> None:
        if self.head is not None:
            save_head(self.head, self.data.classes, folder / "head")

    def _judge(self, encoder: Encoder, images: Tensor, prototypes: Tensor) -> ClassificationResult:
        assert self.val_data is not None
        return evaluate_classification(
            encoder.clip,
            self.val_data,
            self.prompts,
            encoder=encoder,
            image_features=images,
            prototypes=prototypes,
        )

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
        features = inputs.encode_own_captions(texts)
        return lambda: features

    def _prototypes(self, inputs: Inputs) -> Tensor:
        """Unit-norm features of classes, (C, D) on the CPU, as `class_features` gives them."""
        if inputs.setup.world.alone:
            return class_features(inputs.encoder, self.prompts)
        features = inputs.encode_captions([text for group in self.prompts for text in group])
        return pool_prompts(features, [len(group) for group in self.prompts])

    def _digest(self) -> str:
        """What the training data are, by names, labels and prompts."""
        weights = None if self.options.weights is None else list(self.options.weights)
        known = repr((self.data.classes, [*map(tuple, self.prompts)], weights))
        digest = hashlib.sha256(known.encode())
        for image, label in zip(self.data.images, self.data.labels, strict=True):
            digest.update(f"{image.name}\t{label}\n".encode(errors="surrogatepass"))
        return digest.hexdigest()[:16]


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


def _judge_head(head: Head, images: Tensor, val: Labelled) -> ClassificationResult:
    with torch.no_grad():
        logits = head(images.to(head.weight.device))
    return classification_metrics(logits, torch.tensor(val.labels), val.classes)


def _named(data: Labelled) -> Pairs:
    """Each image with the name of its class for a caption."""
    return Pairs(data.images, tuple((data.classes[label],) for label in data.labels))
