"""One run from a prepared task to a run folder with an adapter in it: what every kind of training shares."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clipgraft.adapters.native import findable
from clipgraft.config import TrainSpec
from clipgraft.engine.encoder import Encoder
from clipgraft.files import write_json
from clipgraft.lora.counting import count_parameters
from clipgraft.lora.state import lora_state
from clipgraft.models.clip import Clip
from clipgraft.models.precision import use_autocast
from clipgraft.models.save import size_on_disk
from clipgraft.train.checkpoint import recorded_settings
from clipgraft.train.distributed import ALONE, Peers
from clipgraft.train.feed import Feed
from clipgraft.train.locking import lock_tower
from clipgraft.train.loop import Loop
from clipgraft.train.objectives import Objective
from clipgraft.train.optim import make_optimizer
from clipgraft.train.parts import part_ends, schedule_of
from clipgraft.train.run_folder import RunFolder, SilentFolder, latest_checkpoint
from clipgraft.train.saving import Saver
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


@dataclass(frozen=True)
class Task:
    """What one kind of training brings.

    Attributes:
        feed: the batches.
        objective: what a step minimises.
        evaluate: metrics of the model as it is, the same in every process; None if there is nothing to
            evaluate on.
        headline: the numbers of them that people look at first, in words.
        head: what trains besides the model, or None.
    """

    feed: Feed
    objective: Objective
    evaluate: Callable[[], dict[str, float]] | None
    headline: Callable[[Mapping[str, float]], str]
    head: nn.Module | None = None


@dataclass(frozen=True)
class Keeping:
    """What a run keeps and how often, in epochs; 0 is only after the last.

    Attributes:
        save_frequency: of adapters, or models.
        val_frequency: of evaluations.
        save_lora_only: keep adapters without the whole model.
        checkpoint_steps: steps between checkpoints besides those of every epoch; 0 for none.
    """

    save_frequency: int = 1
    val_frequency: int = 1
    save_lora_only: bool = True
    checkpoint_steps: int = 0


def run_task(
    clip: Clip,
    spec: TrainSpec,
    out: Path,
    prepare: Callable[[Encoder], Task],
    *,
    keeping: Keeping,
    settings: Mapping[str, Any],
    autocast: bool,
    resume: bool,
    progress: bool,
    params: Mapping[str, Any],
    peers: Peers = ALONE,
) -> FitResult:
    """Prepare a task, train on it, and save what came of it.

    `settings` are what must not change between a checkpoint and the run that goes on from it; `params` is
    what params.txt records besides.

    Raises:
        ConfigError: options out of range, nothing to train, or `out` holds another run.
        TrainingError: the loss is not finite, or gradients are where they must not be.
        Interrupted: stopped by SIGINT or SIGTERM, with everything saved; a KeyboardInterrupt.
    """
    started = time.perf_counter()
    recorded = {**params, **settings, "source": asdict(findable(clip))}
    folder = RunFolder(out, recorded, resume) if peers.root else SilentFolder(out)
    with folder:
        encoder = Encoder(clip, autocast, grad_checkpointing=spec.grad_checkpointing)
        task = prepare(encoder)
        if not trains(clip, "vision"):
            encoder.forget("vision")
        saver = Saver(clip, folder.path, keeping.save_lora_only)
        trained = clip.model if task.head is None else nn.ModuleDict({"model": clip.model, "head": task.head})
        loop = Loop(
            clip=clip,
            trained=trained,
            feed=task.feed,
            objective=task.objective,
            optimizer=make_optimizer(
                trained, spec.lr, spec.wd, spec.beta1, spec.beta2, spec.eps, spec.lora_plus_ratio
            ),
            schedule=schedule_of(spec, task.feed.steps),
            epochs=spec.epochs,
            grad_clip_norm=spec.grad_clip_norm,
            checkpoint_steps=keeping.checkpoint_steps,
            settings=settings,
            epoch_end=_epoch_end(task, saver if peers.root else None, keeping, part_ends(spec)),
            progress=progress and peers.root,
            peers=peers,
            seed=spec.seed,
        )
        torch.manual_seed(spec.seed)
        try:
            loop.run(folder, resume)
        finally:
            clip.eval()
        return peers.at_root(lambda: _finish(clip, folder, saver, spec.epochs, started))


def _finish(
    clip: Clip, folder: RunFolder | SilentFolder, saver: Saver, epochs: int, started: float
) -> FitResult:
    """Save what came of a run, and say so."""
    assert isinstance(folder, RunFolder)
    history = folder.history()
    saved = saver.save_final(epochs, history[-1] if history else {})
    seconds = time.perf_counter() - started
    trainable = count_parameters(clip).trainable
    result = FitResult(folder.path, saved, size_on_disk(saved), trainable, seconds, history)
    write_json(folder.path / "results.json", _plain(asdict(result)))
    log.info(
        "saved %s (%.2f MB, %s trained weights, %.0f s)",
        saved,
        result.bytes / 1e6,
        f"{trainable:,}",
        seconds,
    )
    return result


def _epoch_end(
    task: Task, saver: Saver | None, keeping: Keeping, ends: Collection[int]
) -> Callable[[int], Mapping[str, float] | None]:
    def epoch_end(epoch: int) -> Mapping[str, float] | None:
        metrics = None
        if task.evaluate is not None and _due(epoch, keeping.val_frequency, ends):
            metrics = task.evaluate()
            log.info("epoch %d: %s", epoch, task.headline(metrics))
        if saver is not None and _due(epoch, keeping.save_frequency, ends):
            saver.save_epoch(epoch, metrics or {})
        return metrics

    return epoch_end


def choose_trainable(clip: Clip, spec: TrainSpec) -> None:
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


def choose_autocast(choice: bool | None, clip: Clip, out: Path, resume: bool, peers: Peers = ALONE) -> bool:
    """As chosen; else as a resumed run did so far, whatever a measurement says today; else measured."""
    return peers.at_root(lambda: _choose_autocast(choice, clip, out, resume))


def _choose_autocast(choice: bool | None, clip: Clip, out: Path, resume: bool) -> bool:
    latest = latest_checkpoint(out)
    if choice is None and resume and latest.exists():
        recorded = recorded_settings(latest).get("autocast")
        if isinstance(recorded, bool):
            log.info("computing in %s, as this run did before", "bf16" if recorded else "fp32")
            return recorded
    return use_autocast(choice, clip.device)


def common_settings(
    clip: Clip, spec: TrainSpec, autocast: bool, exact_preprocess: bool, peers: Peers = ALONE
) -> dict[str, Any]:
    """What no kind of run may change before it is resumed, its data aside."""
    state = lora_state(clip)
    return {
        **spec.model_dump(),
        "autocast": autocast,
        "exact_preprocess": exact_preprocess,
        "base": clip.fingerprint,
        "lora": asdict(state.chosen().settings) if state is not None else None,
        **({} if peers.alone else {"processes": peers.size}),
    }


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}


def _due(epoch: int, frequency: int, ends: Collection[int]) -> bool:
    """Whether it is an epoch's turn; that of the last of every part, be it the run's end or not, always."""
    return epoch in ends or (frequency > 0 and epoch % frequency == 0)
