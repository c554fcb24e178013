"""`fit`: from a model, pairs and settings to a run folder with an adapter in it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from clipgraft.data.datasets import Pairs
from clipgraft.data.feature_cache import FeatureCache
from clipgraft.data.features import encode_captions, encode_images
from clipgraft.engine.encoder import Encoder
from clipgraft.evaluate.bootstrap import Measured
from clipgraft.evaluate.metrics import headline
from clipgraft.evaluate.retrieval import measure_retrieval
from clipgraft.lora.state import require_unmerged
from clipgraft.models.clip import ClipLike, as_clip
from clipgraft.train.distributed import ALONE, World, in_shares
from clipgraft.train.feature_sources import FixedImages
from clipgraft.train.inputs import Inputs, prepare_inputs
from clipgraft.train.learnable import require_contrast, require_different
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

__all__ = ["FitResult", "fit"]


def fit(
    model: ClipLike,
    train: Pairs,
    val: Pairs | None = None,
    *,
    out: str | Path,
    resume: bool = False,
    save_frequency: int = 1,
    val_frequency: int = 1,
    save_lora_only: bool = True,
    checkpoint_steps: int = 0,
    autocast: bool | None = False,
    workers: int = 2,
    progress: bool | None = None,
    image_features: Tensor | None = None,
    cache: FeatureCache | None = None,
    exact_preprocess: bool = False,
    params: Mapping[str, Any] | None = None,
    world: World = ALONE,
    **options: Any,
) -> FitResult:
    """Train a model's adapter on pairs, or the model itself if it carries none.

    A tower in which nothing trains and whose input is deterministic is encoded once, before the first step.

    Args:
        model: a `Clip` with tokenizer and preprocessing; `apply_lora` first to train an adapter.
        train: images and captions to train on.
        val: images and captions to evaluate on.
        out: the run folder.
        resume: continue the run in `out` if it has a checkpoint, to the same bits.
        save_frequency: keep an adapter every so many epochs; 0 keeps only the last.
        val_frequency: evaluate every so many epochs; 0 only after the last.
        save_lora_only: save the adapter without also saving the whole model with it.
        checkpoint_steps: checkpoint every so many steps besides every epoch; 0 for epochs only.
        autocast: compute in bf16 where it is safe; with None where the device is also fast at it, or as the
            run did that is resumed.
        workers: processes that decode images.
        progress: None and True show bars where the output is a terminal, False never.
        image_features: (N, D) unit-norm features of `train.images`, where they are known already; used if the
            image tower is frozen.
        cache: where features of a frozen image tower are looked up and kept for other runs.
        exact_preprocess: preprocess images with the model's own transform, to the last grey level, also where
            what a frozen tower gives for them is computed once (`clipgraft.data.preprocessing`).
        params: what else params.txt is to record.
        world: the processes that train together, each of which calls this (`clipgraft.train.launch`).
        **options: fields of `clipgraft.train.args.TrainArgs`: `lr`, `epochs`, `batch_size`, …

    Raises:
        AdapterError: adapters are merged into the base, or none is active.
        ConfigError: options out of range, nothing to train, or `out` holds another run.
        DataError: fewer pairs than one batch, or an image that turns out unreadable.
        TrainingError: the loss is not finite, or gradients are where they must not be.
        Interrupted: stopped by SIGINT or SIGTERM, with everything saved; a KeyboardInterrupt.
    """
    clip, out = as_clip(model), Path(out)
    require_unmerged(clip, "train")
    spec = plan_epochs(options, out, resume, world)
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
            image_features=image_features,
            cache=cache,
            cache_views=spec.cache_views,
            exact_preprocess=exact_preprocess,
            world=world,
        )
        if isinstance(inputs.images, FixedImages):
            require_different(inputs.images.features)
        gallery = choose_gallery(inputs.feed, inputs.images, inputs.texts, spec.negatives)
        objective = Contrastive(clip, inputs.images, inputs.texts, gallery)
        evaluate = None if val is None else evaluation(val, inputs, encoder, workers, exact_preprocess, world)
        return Task(inputs.feed, objective, evaluate, headline)

    return run_task(
        clip,
        spec,
        out,
        prepare,
        keeping=Keeping(save_frequency, val_frequency, save_lora_only, checkpoint_steps),
        settings={
            **common_settings(clip, spec, autocast, exact_preprocess, world),
            "data": data_digest(train),
        },
        autocast=autocast,
        resume=resume,
        progress=progress is not False,
        params=params or {},
        world=world,
    )


def evaluation(
    val: Pairs,
    inputs: Inputs,
    encoder: Encoder,
    workers: int,
    exact_preprocess: bool,
    world: World = ALONE,
) -> Callable[[], Measured]:
    """Retrieval metrics of the model as it is; features of its frozen parts are not computed again.

    Several processes encode a share each, and rank 0 counts.
    """
    captions = [caption for group in val.captions for caption in group]
    encode = partial(
        encode_images, encoder.clip, workers=workers, encoder=encoder, exact_preprocess=exact_preprocess
    )

    def evaluate() -> Measured:
        known = inputs.val_images
        images = in_shares(world, val.images, encode) if known is None else known()
        texts = in_shares(world, captions, partial(encode_captions, encoder.clip, encoder=encoder))
        return world.on_rank0(lambda: measure_retrieval(encoder, val, images, texts))

    return evaluate


def data_digest(train: Pairs) -> str:
    """What the training data are, by names and captions."""
    digest = hashlib.sha256()
    for image, caption in train.rows():
        digest.update(f"{image}\t{train.images[image].name}\t{caption}\n".encode(errors="surrogatepass"))
    return digest.hexdigest()[:16]
