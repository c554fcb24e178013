"""`distill`: train a model to agree with a larger one on pairs, in the loop that all training runs in."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from clipgraft.data.datasets import Pairs
from clipgraft.data.feature_cache import FeatureCache
from clipgraft.data.features import encode_captions, encode_images
from clipgraft.engine.encoder import Encoder
from clipgraft.errors import ConfigError
from clipgraft.evaluate.metrics import headline
from clipgraft.lora.state import require_unmerged
from clipgraft.models.clip import Clip, ClipLike, as_clip
from clipgraft.train.agreement import Distilled, Teacher, Weights
from clipgraft.train.distributed import ALONE, World, in_shares
from clipgraft.train.feed import Feed
from clipgraft.train.fit import data_digest, evaluation
from clipgraft.train.inputs import prepare_inputs
from clipgraft.train.learnable import require_contrast
from clipgraft.train.negatives import choose_gallery
from clipgraft.train.objectives import Contrastive
from clipgraft.train.run import (
    FitResult,
    Keeping,
    Task,
    choose_autocast,
    choose_trainable,
    common_settings,
    run_task,
)
from clipgraft.train.schedule import plan_epochs
from clipgraft.train.starting import start_adapter

log = logging.getLogger("clipgraft")


def distill(
    student: ClipLike,
    teacher: ClipLike,
    train: Pairs,
    val: Pairs | None = None,
    *,
    out: str | Path,
    contrastive: float = 0.1,
    feature: float = 10.0,
    similarity: float = 1.0,
    resume: bool = False,
    save_frequency: int = 0,
    val_frequency: int = 1,
    save_lora_only: bool = True,
    checkpoint_steps: int = 0,
    autocast: bool | None = False,
    workers: int = 2,
    progress: bool | None = None,
    cache: FeatureCache | None = None,
    exact_preprocess: bool = False,
    params: Mapping[str, Any] | None = None,
    world: World = ALONE,
    **options: Any,
) -> FitResult:
    """Train a student, its adapter or all of it, on pairs and on what a teacher makes of them.

    The loss is `contrastive` times that of `fit`, `feature` times the cosine distance to the teacher's
    features, and `similarity` times the divergence from its similarities in the batch (`train.agreement`).
    The teacher runs once over images and captions, as it is when this is called, and never again.

    Args:
        student: what trains, in place: a `Clip` with tokenizer and preprocessing.
        teacher: another model, of any tokenizer, preprocessing and size.
        train, val, out, resume: as in `clipgraft.fit`.
        contrastive, feature, similarity: weights of the terms, 0 to leave one out.
        save_frequency, val_frequency, save_lora_only, checkpoint_steps, autocast: as in `clipgraft.fit`.
        workers, progress, exact_preprocess, params, world: as in `clipgraft.fit`.
        cache: where image features of the teacher, and of a student's frozen image tower, are kept.
        **options: fields of `clipgraft.train.args.TrainArgs`. With `augment` the student sees crops of images
            whose whole the teacher saw.

    Raises:
        ConfigError: options out of range, nothing to train, features of two sizes with `feature` above 0, or
            `out` holds another run.
        AdapterError, DataError, TrainingError, Interrupted: as `clipgraft.fit`.
    """
    clip, parent, out = as_clip(student), as_clip(teacher), Path(out)
    weights = _checked(Weights(contrastive, feature, similarity))
    require_unmerged(clip, "train")
    spec = plan_epochs(options, out, resume, world)
    if not weights.feature and not weights.similarity:
        require_contrast(train)
    choose_trainable(clip, spec)
    autocast = choose_autocast(autocast, clip, out, resume, world)

    def prepare(encoder: Encoder) -> Task:
        start_adapter(clip, train, spec.seed)
        inputs = prepare_inputs(
            clip,
            train,
            val,
            batch_size=spec.batch_size,
            accum_freq=spec.accum_freq,
            seed=spec.seed,
            augment=spec.augment,
            encoder=encoder,
            workers=workers,
            progress=progress is not False,
            cache=cache,
            cache_views=spec.cache_views,
            exact_preprocess=exact_preprocess,
            world=world,
        )
        log.info("the teacher encodes each image and caption once")
        teaching = Encoder(parent, autocast)
        encode = partial(
            encode_images,
            parent,
            workers=workers,
            encoder=teaching,
            cache=cache,
            exact_preprocess=exact_preprocess,
        )
        images = in_shares(world, train.images, encode)
        taught = _teacher(parent, teaching, images, inputs.feed, world)
        if weights.feature:
            _check_sizes(clip, encoder, images)
        gallery = choose_gallery(inputs.feed, inputs.images, inputs.texts, spec.negatives)
        pairs = Contrastive(clip, inputs.images, inputs.texts, gallery)
        evaluate = None if val is None else evaluation(val, inputs, encoder, workers, exact_preprocess, world)
        return Task(inputs.feed, Distilled(pairs, taught, weights, clip.logit_scale), evaluate, headline)

    return run_task(
        clip,
        spec,
        out,
        prepare,
        keeping=Keeping(save_frequency, val_frequency, save_lora_only, checkpoint_steps),
        settings={
            **common_settings(clip, spec, autocast, exact_preprocess, world),
            "data": data_digest(train),
            "teacher": parent.fingerprint,
            "weights": asdict(weights),
        },
        autocast=autocast,
        resume=resume,
        progress=progress is not False,
        params=params or {},
        world=world,
    )


def _checked(weights: Weights) -> Weights:
    given = asdict(weights)
    for name, value in given.items():
        if not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"--{name}: got {value}, allowed is a number from 0 up")
    if not any(given.values()):
        raise ConfigError("--contrastive, --feature and --similarity are all 0: one of them must count")
    return weights


def _teacher(parent: Clip, encoder: Encoder, images: Tensor, feed: Feed, world: World) -> Teacher:
    texts = in_shares(world, feed.captions, partial(encode_captions, parent, encoder=encoder))
    return Teacher(images, texts, float(parent.logit_scale.detach()))


def _check_sizes(clip: Clip, encoder: Encoder, wanted: Tensor) -> None:
    own = encode_captions(clip, [""], encoder=encoder).shape[1]
    if own != wanted.shape[1]:
        raise ConfigError(
            f"the student's features have {own} numbers and the teacher's {wanted.shape[1]}: "
            "give --feature 0 and let their similarities agree"
        )
