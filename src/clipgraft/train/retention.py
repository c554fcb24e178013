"""Hold a model to its base on texts that it is not to forget, while it learns something else.

What a trained text tower gives for such a text stays near what the base gave (feature distillation, as in
CLIP-KD, Yang et al. 2023, arXiv:2307.12732). A trained image tower is held by the training images themselves:
how they compare with the texts stays as the base had it (learning without forgetting, Li & Hoiem 2016,
arXiv:1606.09282), so that no other pictures are needed.
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
from clipgraft.lora.control import lora_disabled
from clipgraft.lora.state import lora_state
from clipgraft.models.clip import Clip
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
_MOST_A_STEP = 64  # texts; at most as many as its batch has pairs
_OF_THE_GAIN = 0.05  # that may be given up for keeping more
_SIMILARITY = 0.1  # what the divergence counts beside the distance, which is smaller by about that much


@contextlib.contextmanager
def as_base(clip: Clip) -> Iterator[None]:
    """Let a model be the base that training began from: without its adapter, if it has one."""
    with lora_disabled(clip) if lora_state(clip) is not None else contextlib.nullcontext():
        yield


@dataclass(frozen=True)
class Anchors:
    """Texts, and what the base makes of them and of the training images.

    Attributes:
        texts: (T, D) unit-norm features by the base.
        images: (images, D) unit-norm features of the training images by the base; None where the image tower
            does not train.
        encode: indices of texts -> their features as they are now, any norm; None where the text tower does
            not train.
        logit_scale: the base's log inverse temperature.
    """

    texts: Tensor
    images: Tensor | None
    encode: Callable[[Tensor], Tensor] | None
    logit_scale: float


def make_anchors(inputs: Inputs, texts: Sequence[str], images: Sequence[Path]) -> Anchors:
    """Encode texts, and training images if their tower trains, by the base; before the first step."""
    clip, encoder = inputs.setup.clip, inputs.encoder
    with as_base(clip):
        of_texts = inputs.encode_captions(texts)
        of_images = inputs.encode_images(images, encoder) if trains(clip, "vision") else None
        scale = float(clip.logit_scale.detach())
    encode = None
    if trains(clip, "text"):
        tokens = clip.tokenize(texts)

        def encode(ids: Tensor) -> Tensor:
            return encoder.encode_text(tokens[ids])

    return Anchors(of_texts, of_images, encode, scale)


@dataclass(frozen=True)
class Retaining:
    """Another objective, and `weight` times the distance from the base.

    The texts of a step are drawn by its batch, so that a resumed run draws them again. Of several processes
    rank 0 encodes them: they stand before its own texts, which are the first of all.

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
        encode = self.anchors.encode
        if encode is None or not self.is_rank0:
            return [first, *others]
        ids = self._drawn(batch)

        def with_anchors() -> Features:
            images, texts = first()
            return images, torch.cat([encode(ids).to(texts), texts])

        return [with_anchors, *others]

    def loss(self, batch: Sequence[MicroBatch]) -> Loss:
        of_task = self.task.loss(batch)
        ids = self._drawn(batch)
        image_ids = torch.cat([part.image_ids for part in batch])
        given = len(ids) if self.anchors.encode is not None else 0

        def loss(images: Tensor, texts: Tensor) -> Tensor:
            total = of_task(images, texts[given:])
            wanted = self.anchors.texts[ids].to(images.device)
            now = texts[:given] if given else wanted
            return total + self.weight * self._distance(images, image_ids, now, wanted)

        return loss

    def _distance(self, images: Tensor, image_ids: Tensor, texts: Tensor, wanted: Tensor) -> Tensor:
        total = images.new_zeros((), dtype=torch.promote_types(images.dtype, torch.float32))
        if self.anchors.encode is not None:
            total = total + feature_distance(texts, wanted)
        if self.anchors.images is not None:
            base = self.anchors.images[image_ids].to(images.device)
            scale = torch.tensor(self.anchors.logit_scale, device=images.device)
            now = images, texts, self.logit_scale
            total = total + _SIMILARITY * similarity_divergence(now, (base, wanted, scale))
        return total

    def _drawn(self, batch: Sequence[MicroBatch]) -> Tensor:
        """The texts of a step: others for every batch, and the same however processes share it."""
        count = len(self.anchors.texts)
        if count <= self.most:
            return torch.arange(count)
        first = batch[0]
        seed = (int(first.turns[0]) << 32) + int(first.caption_ids[0])  # a pair is first once an epoch
        return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[: self.most]


def hold_to_base(task: Objective, inputs: Inputs, retained: Retained, images: Sequence[Path]) -> Retaining:
    """Let an objective hold its model to the base too; `images` are those of the training data."""
    setup = inputs.setup
    texts, _ = retained.parts()
    log.info("held to the base on %s: %s", f"{len(texts):,} texts", retained.name)
    return Retaining(
        task=task,
        anchors=make_anchors(inputs, texts, images),
        weight=WEIGHT if retained.weight == "auto" else retained.weight,
        most=min(_MOST_A_STEP, setup.train.batch_size * setup.train.accum_freq * setup.world.world_size),
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
