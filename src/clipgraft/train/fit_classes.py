"""`fit_classifier`: from a model, labelled images and prompts to a run folder with an adapter in it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clipgraft.data.datasets import Labelled, Pairs
from clipgraft.data.feature_cache import FeatureCache
from clipgraft.data.features import encode_captions, encode_images
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
from clipgraft.evaluate.metrics import headline
from clipgraft.lora.state import require_unmerged
from clipgraft.models.clip import ClipLike, as_clip
from clipgraft.train.classes import Head, HeadKind, save_head
from clipgraft.train.distributed import ALONE, World, in_shares
from clipgraft.train.feature_sources import trains
from clipgraft.train.inputs import Inputs, prepare_inputs
from clipgraft.train.learnable import require_classes
from clipgraft.train.objectives import Headed, Objective, Prompted
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


def fit_classifier(
    model: ClipLike,
    train: Labelled,
    val: Labelled | None = None,
    *,
    prompts: Sequence[Sequence[str]],
    out: str | Path,
    head: Literal["prompts"] | HeadKind = "prompts",
    weights: Sequence[float] | None = None,
    resume: bool = False,
    save_frequency: int = 1,
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
    """Train a model to tell classes apart: cross-entropy over their prompts, or over a head.

    Args:
        model: a `Clip` with tokenizer and preprocessing; `apply_lora` first to train an adapter.
        train: labelled images to train on.
        val: labelled images of the same classes to evaluate on.
        prompts: one or more of each class (`clipgraft.data.prompts.class_prompts`).
        out: the run folder.
        head: what tells classes apart: their `prompts`, encoded once a step, or once if the text tower is
            frozen; or a `linear` or `cosine` classifier on image features that starts as the prompts say. A
            head is saved in `head/` of the run folder.
        weights: of each class in the loss, where they differ in size (`class_weights`).
        resume, save_frequency, val_frequency, save_lora_only, checkpoint_steps, autocast, workers, progress,
            cache, exact_preprocess, params, world: as for `fit`.
        **options: fields of `clipgraft.train.args.TrainArgs`: `lr`, `epochs`, `batch_size`, …

    Raises:
        AdapterError: adapters are merged into the base, or none is active.
        ConfigError: options out of range, nothing to train, a text tower that trains beside a head, or `out`
            holds another run.
        DataError: fewer images than one batch, a class without prompt, or other classes in `val`.
        TrainingError: the loss is not finite, or gradients are where they must not be.
        Interrupted: stopped by SIGINT or SIGTERM, with everything saved; a KeyboardInterrupt.
    """
    clip, out = as_clip(model), Path(out)
    require_unmerged(clip, "train")
    spec = plan_epochs(options, out, resume, world)
    _check(train, val, prompts)
    require_classes(train)
    choose_trainable(clip, spec)
    if head != "prompts" and trains(clip, "text"):
        raise ConfigError(
            f"--head {head} reads no texts, but the text tower is to train: adapt image sites alone "
            "(--lora-targets vision-attention), add --lock-text, or use --head prompts"
        )
    autocast = choose_autocast(autocast, clip, out, resume, world)
    made: list[Head] = []

    def prepare(encoder: Encoder) -> Task:
        pairs = _as_pairs(train)
        start_adapter(clip, _with_prompts(train, prompts), spec.seed)
        inputs = prepare_inputs(
            clip,
            pairs,
            None if val is None else _as_pairs(val),
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
            may_be_frozen=head != "prompts",
            world=world,
        )
        classes = torch.tensor([train.classes.index(name) for name in inputs.feed.captions])
        scales = None if weights is None else torch.tensor(list(weights))
        objective: Objective
        if head == "prompts":
            counts = [len(group) for group in prompts]
            objective = Prompted(
                clip, inputs.images, _prompt_features(encoder, prompts, world), counts, classes, scales
            )
        else:
            start = _prototypes(encoder, prompts, world)
            made.append(Head(head, start, float(clip.logit_scale.detach().exp())).to(clip.device))
            objective = Headed(clip, inputs.images, made[0], classes, scales)
        evaluate = None
        if val is not None:
            evaluate = _evaluation(val, prompts, inputs, encoder, made, exact_preprocess, world)
        return Task(inputs.feed, objective, evaluate, headline, made[0] if made else None)

    settings = common_settings(clip, spec, autocast, exact_preprocess, world)
    result = run_task(
        clip,
        spec,
        out,
        prepare,
        keeping=Keeping(save_frequency, val_frequency, save_lora_only, checkpoint_steps),
        settings={**settings, "head": head, "data": _digest(train, prompts, weights)},
        autocast=autocast,
        resume=resume,
        progress=progress is not False,
        params=params or {},
        world=world,
    )
    if made and world.is_rank0:
        save_head(made[0], train.classes, out / "head")
    return result


def _prompt_features(
    encoder: Encoder, prompts: Sequence[Sequence[str]], world: World
) -> Callable[[], Tensor] | None:
    """This process's share of all prompts, as (P, D) features: computed at every call if the text tower
    trains, else once."""
    everywhere = [text for group in prompts for text in group]
    texts = everywhere[world.share(len(everywhere))]
    if not texts:
        return None
    if trains(encoder.clip, "text"):
        tokens = encoder.clip.tokenize(texts)
        return lambda: encoder.encode_text(tokens)
    log.info("the text tower is frozen: each prompt is encoded once")
    features = encode_captions(encoder.clip, texts, encoder=encoder)
    return lambda: features


def _evaluation(
    val: Labelled,
    prompts: Sequence[Sequence[str]],
    inputs: Inputs,
    encoder: Encoder,
    heads: Sequence[nn.Module],
    exact_preprocess: bool,
    world: World,
) -> Callable[[], Measured]:
    """Metrics of the model, or of its head, as it is; features of frozen parts are not computed again.

    Several processes encode a share each, and rank 0 counts.
    """
    clip = encoder.clip
    encode = partial(encode_images, clip, encoder=encoder, exact_preprocess=exact_preprocess)

    def judge(images: Tensor, prototypes: Tensor) -> ClassificationResult:
        return evaluate_classification(
            clip, val, prompts, encoder=encoder, image_features=images, prototypes=prototypes
        )

    def judge_head(images: Tensor) -> ClassificationResult:
        with torch.no_grad():
            logits = heads[0](images.to(clip.device))
        return classification_metrics(logits, torch.tensor(val.labels), val.classes)

    def evaluate() -> Measured:
        known = inputs.val_images
        images = in_shares(world, val.images, encode) if known is None else known()
        if heads:
            return world.on_rank0(lambda: judge_head(images).measured)
        prototypes = _prototypes(encoder, prompts, world)
        return world.on_rank0(lambda: judge(images, prototypes).measured)

    return evaluate


def _prototypes(encoder: Encoder, prompts: Sequence[Sequence[str]], world: World) -> Tensor:
    """Unit-norm features of classes, (C, D) on the CPU, as `class_features` gives them."""
    if world.alone:
        return class_features(encoder, prompts)
    texts = [text for group in prompts for text in group]
    features = in_shares(world, texts, partial(encode_captions, encoder.clip, encoder=encoder))
    return pool_prompts(features, [len(group) for group in prompts])


def _as_pairs(data: Labelled) -> Pairs:
    """Each image with the name of its class for a caption."""
    return Pairs(data.images, tuple((data.classes[label],) for label in data.labels))


def _with_prompts(data: Labelled, prompts: Sequence[Sequence[str]]) -> Pairs:
    """Each image with the prompts of its class."""
    return Pairs(data.images, tuple(tuple(prompts[label]) for label in data.labels))


def _check(train: Labelled, val: Labelled | None, prompts: Sequence[Sequence[str]]) -> None:
    if len(prompts) != len(train.classes) or not all(prompts):
        raise DataError(
            f"{sum(1 for group in prompts if group)} of {len(train.classes)} classes have a prompt: give "
            "each class one or more, in the order of the classes"
        )
    if val is not None and val.classes != train.classes:
        others = sorted(set(val.classes) ^ set(train.classes))
        raise DataError(
            f"training and validation images are of different classes, {', '.join(others[:4])}: use the "
            "same classes in both"
        )


def _digest(train: Labelled, prompts: Sequence[Sequence[str]], weights: Sequence[float] | None) -> str:
    """What the training data are, by names, labels and prompts."""
    digest = hashlib.sha256(repr((train.classes, [*map(tuple, prompts)], weights)).encode())
    for image, label in zip(train.images, train.labels, strict=True):
        digest.update(f"{image.name}\t{label}\n".encode(errors="surrogatepass"))
    return digest.hexdigest()[:16]
