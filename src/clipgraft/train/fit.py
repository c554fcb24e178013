"""`fit`: from a model, pairs and settings to a run folder with an adapter in it."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipgraft.config import TrainSpec, build_specs
from clipgraft.data.feature_cache import FeatureCache
from clipgraft.data.pairs import Pairs
from clipgraft.engine.encoder import Encoder
from clipgraft.errors import ConfigError
from clipgraft.evaluate.retrieval import evaluate_retrieval
from clipgraft.files import write_json
from clipgraft.lora.counting import count_parameters
from clipgraft.lora.state import lora_state, require_unmerged
from clipgraft.models.clip import Clip, ClipLike, as_clip
from clipgraft.models.precision import use_autocast
from clipgraft.models.save import size_on_disk
from clipgraft.train.checkpoint import recorded_settings
from clipgraft.train.inputs import prepare_inputs
from clipgraft.train.locking import lock_tower
from clipgraft.train.loop import Loop
from clipgraft.train.negatives import choose_gallery
from clipgraft.train.optim import Schedule, make_optimizer, make_schedule
from clipgraft.train.run_folder import RunFolder, latest_checkpoint
from clipgraft.train.saving import Saver
from clipgraft.train.starting import start_adapter
from clipgraft.train.towers import trains

log = logging.getLogger("clipgraft")


@dataclass(frozen=True)
class FitResult:
    """What a run made.

    Attributes:
        folder: the run folder.
        saved: the adapter folder, or the fine-tuned model.
        bytes: size of `saved`.
        trainable: number of trained weights.
        seconds: of this call, encoding and evaluation included.
        history: metrics of every evaluated epoch of the run, those before a resume included.
    """

    folder: Path
    saved: Path
    bytes: int
    trainable: int
    seconds: float
    history: list[dict[str, float]]


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
    progress: bool = True,
    image_features: Tensor | None = None,
    cache: FeatureCache | None = None,
    exact_preprocess: bool = False,
    params: Mapping[str, Any] | None = None,
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
        progress: show bars where the output is a terminal.
        image_features: (N, D) unit-norm features of `train.images`, where they are known already; used if the
            image tower is frozen.
        cache: where features of a frozen image tower are looked up and kept for other runs.
        exact_preprocess: preprocess images with the model's own transform, to the last grey level, also where
            what a frozen tower gives for them is computed once (`clipgraft.data.preprocessing`).
        params: what else params.txt is to record.
        **options: fields of `clipgraft.config.TrainSpec`: `lr`, `epochs`, `batch_size`, …

    Raises:
        AdapterError: adapters are merged into the base, or none is active.
        ConfigError: options out of range, nothing to train, or `out` holds another run.
        DataError: fewer pairs than one batch, or an image that turns out unreadable.
        TrainingError: the loss is not finite, or gradients are where they must not be.
        Interrupted: stopped by SIGINT or SIGTERM, with everything saved; a KeyboardInterrupt.
    """
    started = time.perf_counter()
    clip = as_clip(model)
    require_unmerged(clip, "train")
    (spec,) = build_specs([TrainSpec], options)
    _choose_trainable(clip, spec)
    autocast = _autocast(autocast, clip, Path(out), resume)
    settings = _resume_settings(clip, spec, train, autocast, exact_preprocess)
    with RunFolder(Path(out), {**settings, **(params or {})}, resume) as folder:
        start_adapter(clip, train, spec.seed)
        encoder = Encoder(clip, autocast, grad_checkpointing=spec.grad_checkpointing)
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
            progress=progress,
            image_features=image_features,
            cache=cache,
            cache_views=spec.cache_views,
            exact_preprocess=exact_preprocess,
        )
        if not trains(clip, "vision"):
            encoder.forget("vision")
        saver = Saver(clip, folder.path, save_lora_only)

        def epoch_end(epoch: int) -> Mapping[str, float] | None:
            metrics = None
            if val is not None and _due(epoch, val_frequency, spec.epochs):
                metrics = evaluate_retrieval(
                    clip,
                    val,
                    workers=workers,
                    encoder=encoder,
                    image_features=None if inputs.val_images is None else inputs.val_images(),
                    exact_preprocess=exact_preprocess,
                )
                log.info("epoch %d: %s", epoch, headline(metrics))
            if _due(epoch, save_frequency, spec.epochs):
                saver.save_epoch(epoch, metrics or {})
            return metrics

        loop = Loop(
            clip=clip,
            feed=inputs.feed,
            images=inputs.images,
            texts=inputs.texts,
            optimizer=make_optimizer(
                clip.model, spec.lr, spec.wd, spec.beta1, spec.beta2, spec.eps, spec.lora_plus_ratio
            ),
            schedule=_schedule(spec, inputs.feed.steps),
            epochs=spec.epochs,
            gallery=choose_gallery(inputs.feed, inputs.images, inputs.texts, spec.negatives),
            grad_clip_norm=spec.grad_clip_norm,
            checkpoint_steps=checkpoint_steps,
            settings=settings,
            epoch_end=epoch_end,
            progress=progress,
        )
        torch.manual_seed(spec.seed)
        try:
            loop.run(folder, resume)
        finally:
            clip.eval()
        history = folder.history()
        saved = saver.save_final(spec.epochs, history[-1] if history else {})
        result = FitResult(
            folder=folder.path,
            saved=saved,
            bytes=size_on_disk(saved),
            trainable=count_parameters(clip).trainable,
            seconds=time.perf_counter() - started,
            history=history,
        )
        write_json(folder.path / "results.json", _plain(asdict(result)))
        log.info(
            "saved %s (%.2f MB, %s trained weights, %.0f s)",
            saved,
            result.bytes / 1e6,
            f"{result.trainable:,}",
            result.seconds,
        )
    return result


def headline(metrics: Mapping[str, float]) -> str:
    """The four numbers people look at first."""
    names = ("image_to_text_R@1", "image_to_text_R@5", "text_to_image_R@1", "text_to_image_R@5")
    return ", ".join(f"{name} {100 * metrics[name]:.1f} %" for name in names if name in metrics)


def _choose_trainable(clip: Clip, spec: TrainSpec) -> None:
    """The adapter if there is one; else everything but what the lock flags freeze."""
    if lora_state(clip) is None:
        clip.model.requires_grad_(True)
        if spec.lock_image:
            lock_tower(clip, "vision", spec.lock_image_unlocked_groups)
        if spec.lock_text:
            lock_tower(clip, "text", spec.lock_text_unlocked_layers)
    if clip.logit_scale.requires_grad:
        # A step moves the temperature by less than two neighbouring bf16 numbers are apart.
        clip.logit_scale.data = clip.logit_scale.data.float()
    if spec.grad_checkpointing:
        clip.family.set_grad_checkpointing(clip.model, True)


def _schedule(spec: TrainSpec, steps_per_epoch: int) -> Schedule:
    total = steps_per_epoch * spec.epochs
    warmup = min(spec.warmup, total // 10)
    if warmup < spec.warmup:
        log.info("warmup: %d of this run's %d steps, instead of %d", warmup, total, spec.warmup)
    cooldown = (spec.epochs_cooldown or 0) * steps_per_epoch
    if spec.lr_scheduler == "const-cooldown" and not 0 < cooldown <= total:
        raise ConfigError(f"--lr-scheduler const-cooldown needs --epochs-cooldown from 1 to {spec.epochs}")
    return make_schedule(
        spec.lr_scheduler, spec.lr, warmup, total, cooldown, spec.lr_cooldown_end, spec.lr_cooldown_power
    )


def _autocast(choice: bool | None, clip: Clip, out: Path, resume: bool) -> bool:
    """As chosen; else as a resumed run did so far, whatever a measurement says today; else measured."""
    latest = latest_checkpoint(out)
    if choice is None and resume and latest.exists():
        recorded = recorded_settings(latest).get("autocast")
        if isinstance(recorded, bool):
            log.info("computing in %s, as this run did before", "bf16" if recorded else "fp32")
            return recorded
    return use_autocast(choice, clip.device)


def _resume_settings(
    clip: Clip, spec: TrainSpec, train: Pairs, autocast: bool, exact_preprocess: bool
) -> dict[str, Any]:
    """What must not change between a checkpoint and the run that goes on from it."""
    state = lora_state(clip)
    digest = hashlib.sha256()
    for image, caption in train.rows():
        digest.update(f"{image}\t{train.images[image].name}\t{caption}\n".encode(errors="surrogatepass"))
    return {
        **spec.model_dump(),
        "autocast": autocast,
        "exact_preprocess": exact_preprocess,
        "base": clip.fingerprint,
        "lora": asdict(state.chosen().settings) if state is not None else None,
        "data": digest.hexdigest()[:16],
    }


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}


def _due(epoch: int, frequency: int, epochs: int) -> bool:
    return epoch == epochs or (frequency > 0 and epoch % frequency == 0)
