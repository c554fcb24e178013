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
from tqdm import tqdm

from clipgraft.adapters.native import save_adapter
from clipgraft.config import TrainSpec, build_specs
from clipgraft.data.features import encode_captions, encode_images
from clipgraft.data.loading import Transform
from clipgraft.data.pairs import Pairs
from clipgraft.errors import ConfigError
from clipgraft.evaluate.retrieval import evaluate_retrieval
from clipgraft.files import atomic_path, write_json
from clipgraft.lora.inject import count_parameters, lora_state
from clipgraft.models.clip import Clip, ClipLike, as_clip
from clipgraft.models.save import save_model, size_on_disk
from clipgraft.train.feed import Feed
from clipgraft.train.locking import lock_tower
from clipgraft.train.loop import Loop
from clipgraft.train.optim import make_optimizer, make_schedule
from clipgraft.train.run_folder import RunFolder
from clipgraft.train.towers import FixedFeatures, LiveImages, LiveText, Tower, trains

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
        history: metrics of every evaluated epoch.
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
    autocast: bool = False,
    workers: int = 2,
    progress: bool = True,
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
        autocast: compute in bf16 where it is safe.
        workers: processes that decode images.
        progress: show bars.
        params: what else params.txt is to record.
        **options: fields of `clipgraft.config.TrainSpec`: `lr`, `epochs`, `batch_size`, …

    Raises:
        ConfigError: options out of range, nothing to train, or `out` holds another run.
        DataError: fewer pairs than one batch, or an image that turns out unreadable.
        TrainingError: the loss is not finite, or gradients are where they must not be.
    """
    started = time.perf_counter()
    clip = as_clip(model)
    (spec,) = build_specs([TrainSpec], options)
    adapted = lora_state(clip)
    if adapted is None:
        lock_unless_adapted(clip, spec)
    clip.family.set_grad_checkpointing(clip.model, spec.grad_checkpointing)
    trainable = count_parameters(clip).trainable
    settings = _resume_settings(clip, spec, train, autocast)
    with RunFolder(Path(out), {**settings, **(params or {})}, resume) as folder:
        feed, towers, val_features = _prepare(clip, spec, train, val, autocast, workers, progress)
        saver = _Saver(clip, folder.path, save_lora_only)

        def epoch_end(epoch: int) -> Mapping[str, float] | None:
            metrics = None
            if val is not None and _due(epoch, val_frequency, spec.epochs):
                metrics = evaluate_retrieval(
                    clip, val, workers=workers, autocast=autocast, image_features=val_features
                )
                log.info("epoch %d: %s", epoch, headline(metrics))
            if _due(epoch, save_frequency, spec.epochs):
                saver.save_epoch(epoch, metrics or {})
            return metrics

        torch.manual_seed(spec.seed)
        loop = Loop(
            clip=clip,
            feed=feed,
            images=towers[0],
            texts=towers[1],
            optimizer=make_optimizer(clip.model, spec.lr, spec.wd, spec.beta1, spec.beta2, spec.eps),
            schedule=_schedule(spec, feed.steps),
            epochs=spec.epochs,
            accum_freq=spec.accum_freq,
            grad_clip_norm=spec.grad_clip_norm,
            checkpoint_steps=checkpoint_steps,
            settings=settings,
            epoch_end=epoch_end,
            progress=progress,
        )
        history = loop.run(folder, resume)
        clip.eval()
        saved = saver.save_final(spec.epochs, history[-1] if history else {})
        result = FitResult(
            folder.path, saved, size_on_disk(saved), trainable, time.perf_counter() - started, history
        )
        write_json(folder.path / "results.json", {**_plain(asdict(result))})
    return result


def lock_unless_adapted(clip: Clip, spec: TrainSpec) -> None:
    """Full fine-tuning: everything trains but what the lock flags freeze."""
    clip.model.requires_grad_(True)
    if spec.lock_image:
        lock_tower(clip, "vision", spec.lock_image_unlocked_groups)
    if spec.lock_text:
        lock_tower(clip, "text", spec.lock_text_unlocked_layers)


def headline(metrics: Mapping[str, float]) -> str:
    """The four numbers people look at first."""
    names = ("image_to_text_R@1", "image_to_text_R@5", "text_to_image_R@1", "text_to_image_R@5")
    return ", ".join(f"{name} {100 * metrics[name]:.1f} %" for name in names if name in metrics)


def _prepare(
    clip: Clip,
    spec: TrainSpec,
    train: Pairs,
    val: Pairs | None,
    autocast: bool,
    workers: int,
    progress: bool,
) -> tuple[Feed, tuple[Tower, Tower], Tensor | None]:
    """The feed, both towers, and validation image features where they are constant."""
    live_images, live_texts = trains(clip, "vision"), trains(clip, "text")
    if not live_images and not live_texts:
        raise ConfigError("nothing to train: both towers are frozen; drop a --lock flag or add --use-lora")
    transform: Transform | None = None
    if live_images:
        transform = clip.preprocess_train if spec.augment and clip.preprocess_train else clip.preprocess
    feed = Feed(train, spec.batch_size * spec.accum_freq, spec.seed, transform, workers)
    texts: Tower
    if live_texts:
        texts = LiveText(clip, feed.captions, autocast)
    else:
        texts = FixedFeatures(encode_captions(clip, feed.captions, autocast=autocast))
    if live_images:
        return feed, (LiveImages(clip, autocast), texts), None
    log.info("the image tower is frozen: each image is encoded once")
    images = _encode_once(clip, train, "training images", autocast, workers, progress)
    val_features = None
    if val is not None:
        val_features = _encode_once(clip, val, "validation images", autocast, workers, progress)
    return feed, (FixedFeatures(images), texts), val_features


def _encode_once(clip: Clip, pairs: Pairs, what: str, autocast: bool, workers: int, progress: bool) -> Tensor:
    with tqdm(desc=what, total=len(pairs), unit="image", disable=not progress) as bar:

        def advance(images: int) -> None:
            bar.update(images)

        return encode_images(clip, pairs.images, workers=workers, autocast=autocast, progress=advance)


def _schedule(spec: TrainSpec, steps_per_epoch: int) -> Any:
    total = steps_per_epoch * spec.epochs
    warmup = min(spec.warmup, total // 10)
    if warmup < spec.warmup:
        log.info("warmup: %d steps, a tenth of this run's %d, instead of %d", warmup, total, spec.warmup)
    cooldown = (spec.epochs_cooldown or 0) * steps_per_epoch
    if spec.lr_scheduler == "const-cooldown" and not 0 < cooldown <= total:
        raise ConfigError(f"--lr-scheduler const-cooldown needs --epochs-cooldown from 1 to {spec.epochs}")
    return make_schedule(
        spec.lr_scheduler, spec.lr, warmup, total, cooldown, spec.lr_cooldown_end, spec.lr_cooldown_power
    )


def _resume_settings(clip: Clip, spec: TrainSpec, train: Pairs, autocast: bool) -> dict[str, Any]:
    """What must not change between a checkpoint and the run that goes on from it."""
    state = lora_state(clip)
    digest = hashlib.sha256()
    for image, caption in train.rows():
        digest.update(f"{image}\t{caption}\n".encode())
    return {
        **spec.model_dump(),
        "autocast": autocast,
        "base": clip.fingerprint,
        "lora": _plain(asdict(state.settings)) if state is not None else None,
        "data": digest.hexdigest()[:16],
    }


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}


def _due(epoch: int, frequency: int, epochs: int) -> bool:
    return epoch == epochs or (frequency > 0 and epoch % frequency == 0)


@dataclass(frozen=True)
class _Saver:
    """Writes what a run keeps: adapters, or the fine-tuned model."""

    clip: Clip
    folder: Path
    lora_only: bool

    def save_epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        target = self.folder / "checkpoints" / f"epoch_{epoch}"
        state = lora_state(self.clip)
        if state is None:
            save_model(self.clip, target, epoch)
            return
        save_adapter(self.clip, target, metrics)
        if not self.lora_only:
            self._save_with_base(target.with_name(f"epoch_{epoch}.pt"), epoch)

    def save_final(self, epochs: int, metrics: Mapping[str, float]) -> Path:
        if lora_state(self.clip) is not None:
            return save_adapter(self.clip, self.folder / "adapter", metrics)
        target = self.folder / "checkpoints" / f"epoch_{epochs}"
        return target if target.is_dir() else target.with_name(f"epoch_{epochs}.pt")

    def _save_with_base(self, path: Path, epoch: int) -> None:
        state = lora_state(self.clip)
        assert state is not None
        whole = {
            "epoch": epoch,
            "name": self.folder.name,
            "state_dict": self.clip.model.state_dict(),
            "lora_config": {**asdict(self.clip.source), **asdict(state.settings)},
        }
        with atomic_path(path) as temporary:
            torch.save(whole, temporary)
