"""Hold a model to its base on texts and pictures that it is not to forget, while it learns something else.

What a trained text tower gives for such a text stays near what the base gave (feature distillation, as in
CLIP-KD, Yang et al. 2023, arXiv:2307.12732). A trained image tower is held by pictures: how they compare with
the texts stays as the base had it. These are the training images (learning without forgetting, Li & Hoiem
2016, arXiv:1606.09282), and with them those that are retained, if there are any.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from clipgraft.data.retained import Retained
from clipgraft.engine.encoder import Encoder
from clipgraft.lora.control import lora_disabled
from clipgraft.lora.state import lora_state
from clipgraft.models.clip import Clip
from clipgraft.models.device import queued
from clipgraft.records import Finite, Whole
from clipgraft.train.feed import MicroBatch, trains
from clipgraft.train.gradient_cache import Encode, Features, Loss
from clipgraft.train.inputs import Inputs
from clipgraft.train.loop import same_random
from clipgraft.train.rate import FEWEST_STEPS
from clipgraft.train.recipes.distillation import feature_distance, similarity_divergence
from clipgraft.train.recipes.recipe import Objective
from clipgraft.train.trials import FORWARD, LEAST_LEFT, Subject, Trials, chosen_once, held_out_batches

log = logging.getLogger("clipgraft")
RECORD = "retention.json"
SHARE = 0.05
"""Of the run's steps, which is what finding the weight may cost."""
WEIGHTS = (3.0, 10.0, 30.0, 100.0)
WEIGHT = 30.0
"""Where nothing can be tried."""
_MOST_A_STEP = 64  # texts that are encoded anew; at most as many as its batch has pairs
_MOST_FIXED = 512  # texts that a frozen tower encodes once
_MOST_PICTURES = 32
_OF_THE_GAIN = 0.05  # that may be given up for keeping more
_SIMILARITY = 0.03  # what the divergence counts beside the distance, which is smaller by about that much


@contextlib.contextmanager
def as_base(clip: Clip) -> Iterator[None]:
    """Let a model be the base that training began from: without its adapter, if it has one."""
    with lora_disabled(clip) if lora_state(clip) is not None else contextlib.nullcontext():
        yield


@dataclass(frozen=True)
class Pictures:
    """What the base makes of retained pictures, while the image tower trains.

    Attributes:
        features: (P, D) unit-norm features by the base.
        encode: indices of pictures -> their features as they are now, any norm.
    """

    features: Tensor
    encode: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Anchors:
    """Texts, and what the base makes of them, and of pictures while the image tower trains.

    Attributes:
        texts: (T, D) unit-norm features by the base.
        encode: indices of texts -> their features as they are now, any norm; None where the text tower does
            not train.
        logit_scale: the base's log inverse temperature.
        images: (images, D) unit-norm features of the training images by the base; None where the image tower
            does not train.
        pictures: those that are retained; None where there are none, or the image tower does not train.
    """

    texts: Tensor
    encode: Callable[[Tensor], Tensor] | None
    logit_scale: float
    images: Tensor | None = None
    pictures: Pictures | None = None


def features_by_base(inputs: Inputs, texts: Sequence[str]) -> Tensor:
    """(T, D) unit-norm features of texts by the base: what a trained text tower is taught, or held to."""
    with as_base(inputs.setup.clip):
        return inputs.encode_captions(texts)


def make_anchors(inputs: Inputs, retained: Retained, images: Sequence[Path]) -> Anchors:
    """Encode by the base, before the first step, what a model is held to; `images` are those it trains on."""
    clip, encoder = inputs.setup.clip, inputs.encoder
    texts, _ = retained.parts()
    of_texts = features_by_base(inputs, texts)
    with as_base(clip):
        scale = float(clip.logit_scale.detach())
    anchors = Anchors(of_texts, _encode_texts(clip, encoder, texts), scale)
    if not trains(clip, "vision"):
        return anchors
    paths = () if retained.pairs is None else retained.pairs.images
    with as_base(clip):
        anchors = replace(anchors, images=inputs.encode_images(images, encoder))
        features = inputs.encode_images(paths, encoder) if paths else None
    if features is None:
        return anchors
    return replace(anchors, pictures=Pictures(features, inputs.live_images(paths)))


def _encode_texts(clip: Clip, encoder: Encoder, texts: Sequence[str]) -> Callable[[Tensor], Tensor] | None:
    """What encodes texts as the tower is at the moment; None if it does not train."""
    if not trains(clip, "text"):
        return None
    tokens = clip.tokenize(texts)
    return lambda ids: encoder.encode_text(tokens[ids])


@dataclass(frozen=True)
class Drawn:
    """Indices of what a step holds its model to: (t,) texts and (p,) pictures."""

    texts: Tensor
    pictures: Tensor


@dataclass(frozen=True)
class Retaining:
    """Another objective, and `weight` times the distance from the base.

    The texts and pictures of a step are drawn by its batch, so that a resumed run draws them again. Of
    several processes rank 0 encodes them: they stand before its own, which are the first of all.

    Attributes:
        most: how many texts a step takes.
        logit_scale: of the model that trains.
        is_rank0: whether this process is the one that encodes texts.
    """

    task: Objective
    anchors: Anchors
    weight: float
    most: int
    logit_scale: Tensor
    is_rank0: bool = True

    def parts(self, batch: Sequence[MicroBatch]) -> list[Encode]:
        first, *others = self.task.parts(batch)
        if not self.is_rank0:
            return [first, *others]
        drawn, encode, pictures = self._drawn(batch), self.anchors.encode, self.anchors.pictures

        def with_anchors() -> Features:
            images, texts = first()
            if encode is not None:
                texts = torch.cat([encode(drawn.texts).to(texts), texts])
            if pictures is not None:
                images = torch.cat([pictures.encode(drawn.pictures).to(images), images])
            return images, texts

        return [with_anchors, *others]

    def loss(self, batch: Sequence[MicroBatch]) -> Loss:
        of_task = self.task.loss(batch)
        drawn = self._drawn(batch)
        image_ids = torch.cat([part.image_ids for part in batch])
        given = len(drawn.texts) if self.anchors.encode is not None else 0
        shown = len(drawn.pictures)

        def loss(images: Tensor, texts: Tensor) -> Tensor:
            total = of_task(images[shown:], texts[given:])
            wanted = queued(self.anchors.texts[drawn.texts], images.device)
            now, distance = (
                wanted,
                images.new_zeros((), dtype=torch.promote_types(images.dtype, torch.float32)),
            )
            if given:
                now = texts[:given]
                distance = distance + feature_distance(now, wanted)
            if (base := self._images(drawn, image_ids)) is not None:
                scale = torch.full((), self.anchors.logit_scale, device=images.device)
                student, teacher = (
                    (images, now, self.logit_scale),
                    (queued(base, images.device), wanted, scale),
                )
                distance = distance + _SIMILARITY * similarity_divergence(student, teacher)
            return total + self.weight * distance

        return loss

    def _images(self, drawn: Drawn, image_ids: Tensor) -> Tensor | None:
        """What the base makes of the images that hold their tower, as they stand; None if it is frozen."""
        if self.anchors.images is None:
            return None
        images, pictures = self.anchors.images[image_ids], self.anchors.pictures
        return images if pictures is None else torch.cat([pictures.features[drawn.pictures], images])

    def _drawn(self, batch: Sequence[MicroBatch]) -> Drawn:
        """What a step is held to: other texts for every batch, and the same however processes share it."""
        first = batch[0]
        seed = (int(first.turns[0]) << 32) + int(first.caption_ids[0])  # a pair is first once an epoch
        generator = torch.Generator().manual_seed(seed)
        pictures = self.anchors.pictures
        counts = len(self.anchors.texts), 0 if pictures is None else len(pictures.features)
        texts, images = (torch.randperm(count, generator=generator) for count in counts)
        return Drawn(texts[: self.most], images[: min(_MOST_PICTURES, self.most)])


def hold_to_base(task: Objective, inputs: Inputs, retained: Retained, images: Sequence[Path]) -> Retaining:
    """Let an objective hold its model to the base too; `images` are those of the training data."""
    setup = inputs.setup
    anchors = make_anchors(inputs, retained, images)
    pictures = "" if anchors.pictures is None else f" and {len(anchors.pictures.features):,} pictures"
    log.info("held to the base on %s texts%s: %s", f"{len(anchors.texts):,}", pictures, retained.name)
    batch = setup.train.batch_size * setup.train.accum_freq * setup.world.world_size
    return Retaining(
        task=task,
        anchors=anchors,
        weight=WEIGHT if retained.weight == "auto" else retained.weight,
        most=_MOST_FIXED if anchors.encode is None else min(_MOST_A_STEP, batch),
        logit_scale=setup.clip.logit_scale,
        is_rank0=setup.world.is_rank0,
    )


@dataclass(frozen=True)
class WeightTrial:
    """One short training: the weight, and the held-out loss of the task; None if it was not finite."""

    weight: Finite
    loss: Finite | None


@dataclass(frozen=True)
class Weight:
    """How much the distance from the base counts in a run, and how that was found.

    Attributes:
        trials: in the order of weights; none where nothing could be tried.
        before: held-out loss of the untrained model.
        steps: of each trial.
        cost: of the trials, as a share of the run's steps.
        why: what kept the trials from being made.
    """

    weight: Finite
    trials: tuple[WeightTrial, ...] = ()
    before: Finite | None = None
    steps: Whole = 0
    cost: Finite = 0.0
    why: str | None = None

    def __str__(self) -> str:
        if self.why is not None:
            return f"`retain_weight=auto` takes {self.weight:g}, untried: {self.why}"
        curve = ", ".join(
            f"{trial.weight:g}: {'diverged' if trial.loss is None else f'{trial.loss:.3f}'}"
            for trial in self.trials
        )
        return (
            f"`retain_weight=auto` takes {self.weight:g}, the largest that hardly slows learning: loss on "
            f"training pairs held out, {self.before:.3f} before; {curve} ({self.steps} steps); "
            f"{100 * self.cost:.0f} % of the run's steps"
        )


def choose_weight(what: Subject, folder: Path) -> Weight:
    """Find the weight of a run that is about to begin, and record it in its folder; its rate is known.

    A run that is resumed has the weight it had.

    Raises:
        CheckpointError: the record of a run that is resumed is damaged.
    """
    return chosen_once(what.setup, folder / RECORD, Weight, lambda: _search(what))


def _search(what: Subject) -> Weight:
    setup, retaining = what.setup, what.objective
    assert isinstance(retaining, Retaining)
    if not setup.world.alone:
        return Weight(WEIGHT, why="several processes train together")
    total = what.feed.steps * setup.train.planned_epochs
    held_out = held_out_batches(what.feed.steps)
    measured = FORWARD * held_out * (1 + len(WEIGHTS))
    steps = int((SHARE * total - measured) / len(WEIGHTS))
    if steps < FEWEST_STEPS:
        return Weight(WEIGHT, why=f"{SHARE:.0%} of the run's {total:,} steps are too few for trials")
    with same_random():
        trials = Trials(what, held_out)
        if trials.left < LEAST_LEFT:
            return Weight(WEIGHT, why="the images of one batch are too large a part of all")
        before, lr = trials.loss(), setup.train.peak_lr
        done = tuple(
            WeightTrial(weight, trials.run(lr, steps, replace(retaining, weight=weight)))
            for weight in WEIGHTS
        )
    chosen = largest_harmless(before, done)
    return Weight(chosen, done, before, steps, (len(WEIGHTS) * steps + measured) / total)


def largest_harmless(before: float, trials: Sequence[WeightTrial]) -> float:
    """The largest weight with which the loss fell nearly as far as with the best one."""
    losses = {trial.weight: trial.loss for trial in trials if trial.loss is not None}
    if not losses:
        return WEIGHT
    best = min(losses.values())
    most = best + _OF_THE_GAIN * max(0.0, before - best)
    return max(weight for weight, loss in losses.items() if loss <= most)
