"""One run from a prepared task to a run folder with an adapter in it: what every kind of training shares."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from clipgraft.adapters.adapter_file import findable
from clipgraft.engine.encoder import Encoder
from clipgraft.errors import TrainingError
from clipgraft.evaluate.bootstrap import Measured
from clipgraft.evaluate.metrics import Metrics
from clipgraft.lora.initialization import changes_nothing
from clipgraft.lora.parameters import count_parameters
from clipgraft.lora.state import lora_state
from clipgraft.models.clip import Clip
from clipgraft.models.device import use_autocast
from clipgraft.models.export import size_on_disk
from clipgraft.results import Result
from clipgraft.train.args import TrainArgs
from clipgraft.train.checkpoint import recorded_settings
from clipgraft.train.distributed import ALONE, World
from clipgraft.train.feature_sources import trains
from clipgraft.train.feed import Feed
from clipgraft.train.learnable import nothing_learnt
from clipgraft.train.loop import Loop, running_statistics
from clipgraft.train.objectives import Contrastive, Objective
from clipgraft.train.optimizer import lock_tower, make_optimizer
from clipgraft.train.run_folder import RunFolder, Saver, SilentFolder, latest_checkpoint, made_with
from clipgraft.train.schedule import part_ends, schedule_of
from clipgraft.train.validation import BASE, STARTED, Validation
from clipgraft.train.verdict import Trained, Verdict

log = logging.getLogger("clipgraft")


@dataclass(frozen=True, repr=False)
class FitResult(Result):
    """What a run made.

    Attributes:
        folder: the run folder.
        saved: the adapter folder, or the fine-tuned model.
        bytes: size of `saved`.
        trainable: number of trained weights.
        seconds: of all parts of the run, encoding and evaluation included; what a kill undid is left out.
        history: metrics of every evaluated epoch of the run, those before a resume included.
        base: metrics before the first step; None without validation data.
        best_epoch: the epoch that `saved` is, the best on the validation data; without them the last.
        verdict: whether that epoch is better than what the run began with; None where that is not known.
    """

    _shows = ("saved", "bytes", "trainable", "seconds", "best_epoch", "metrics", "base", "verdict")

    folder: Path
    saved: Path
    bytes: int
    trainable: int
    seconds: float
    history: list[dict[str, float]]
    base: dict[str, float] | None = None
    best_epoch: int | None = None
    verdict: Verdict | None = None

    @property
    def metrics(self) -> Metrics:
        """Of the epoch that `saved` is; empty where nothing was measured."""
        found = (line for line in reversed(self.history) if line["epoch"] == self.best_epoch)
        return Metrics(next(found, {}))


@dataclass(frozen=True)
class Task:
    """What one kind of training brings.

    Attributes:
        feed: the batches.
        objective: what a step minimises.
        evaluate: measures the model as it is, with the same result in every process; None if there is
            nothing to evaluate on.
        headline: the numbers of them that people look at first, in words.
        head: what trains besides the model, or None.
    """

    feed: Feed
    objective: Objective
    evaluate: Callable[[], Measured] | None
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
    spec: TrainArgs,
    out: Path,
    prepare: Callable[[Encoder], Task],
    *,
    keeping: Keeping,
    settings: Mapping[str, Any],
    autocast: bool,
    resume: bool,
    progress: bool,
    params: Mapping[str, Any],
    world: World = ALONE,
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
    recorded = {**params, **settings, "source": asdict(findable(clip)), **_began(clip)}
    _require_same(world, clip, {**recorded, "resume": resume, **asdict(keeping)})
    folder = RunFolder(out, recorded, resume) if world.is_rank0 else SilentFolder(out)
    with folder:
        encoder = Encoder(clip, autocast, grad_checkpointing=spec.grad_checkpointing)
        task = prepare(encoder)
        if not trains(clip, "vision"):
            encoder.forget("vision")
        saver = Saver(clip, folder.path, keeping.save_lora_only)
        validation = Validation(folder.path, _began_with(clip), resume) if world.is_rank0 else None
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
            epoch_end=_EpochEnd(task, keeping, part_ends(spec), world, saver, validation),
            progress=progress and world.is_rank0,
            world=world,
            seed=spec.seed,
            began=started,
        )
        torch.manual_seed(spec.seed)
        try:
            loop.run(folder, resume)
        finally:
            clip.eval()
        kept = world.on_rank0(lambda: validation.restore(trained) if validation else None)
        world.send([p for p in trained.parameters() if p.requires_grad] + running_statistics(trained))
        return world.on_rank0(lambda: _finish(clip, folder, saver, validation, kept, spec, task, loop))


def _require_same(world: World, clip: Clip, values: Mapping[str, Any]) -> None:
    """Refuse processes of one run that were started with other settings, data, base or adapter sites."""
    if world.alone:
        return
    state = lora_state(clip)
    layers = {} if state is None else state.chosen().layers
    sites = {str(site): layer.r for site, layer in layers.items()}
    world.require_same({**values, "adapter sites": sites})


def _finish(
    clip: Clip,
    folder: RunFolder | SilentFolder,
    saver: Saver,
    validation: Validation | None,
    kept: int | None,
    spec: TrainArgs,
    task: Task,
    loop: Loop,
) -> FitResult:
    """Save what came of a run, and say what it bought."""
    assert isinstance(folder, RunFolder)
    assert validation is not None
    history = folder.history()
    epoch = kept or spec.epochs
    saved = saver.save_final(epoch, next((line for line in history if line["epoch"] == epoch), {}))
    seconds = loop.seconds()
    trainable = count_parameters(clip).trainable
    losses = folder.losses()
    verdict = validation.verdict(kept, _as_trained(clip, spec, task, losses))
    result = FitResult(
        folder=folder.path,
        saved=saved,
        bytes=size_on_disk(saved),
        trainable=trainable,
        seconds=seconds,
        history=history,
        base=validation.before,
        best_epoch=epoch,
        verdict=verdict,
    )
    rows = len(task.feed.caption_of_row)
    folder.finish({**asdict(result), "rows": rows, "made_with": made_with(clip)})
    log.info(
        "saved %s (%.2f MB, %s trained weights, %.0f s)",
        saved,
        result.bytes / 1e6,
        f"{trainable:,}",
        seconds,
    )
    if kept is not None and len(history) > 1:
        log.info("%s", _which_epoch(kept, spec.epochs, history, task))
    if task.evaluate is None:
        log.info("without --val-data nobody knows whether this is better than what the run began with")
    if (nothing := nothing_learnt(losses, task.feed.steps)) is not None:
        log.warning("%s", nothing)
    if verdict is not None:
        log.info("%s", verdict)
    return result


def _which_epoch(kept: int, epochs: int, history: list[dict[str, float]], task: Task) -> str:
    """Which epoch is kept, and where the last one is if that is another."""
    told = f"kept epoch {kept} of {epochs}, the best on the validation data"
    if kept == epochs:
        return told
    return f"{told}; the last one, {task.headline(history[-1])}, is checkpoints/epoch_{epochs}"


def _began_with(clip: Clip) -> str:
    """What a run is compared with: an adapter that has been trained before is no base."""
    state = lora_state(clip)
    return BASE if state is None or changes_nothing(state.chosen()) else STARTED


def _as_trained(clip: Clip, spec: TrainArgs, task: Task, losses: list[float]) -> Trained:
    state, steps = lora_state(clip), task.feed.steps
    first, last = losses[:steps], losses[-steps:]
    return Trained(
        rows=len(task.feed.caption_of_row),
        unit="pairs" if isinstance(task.objective, Contrastive) else "images",
        epochs=spec.epochs,
        lr=spec.lr,
        roles=None if state is None else {(site.tower, site.role) for site in state.chosen().layers},
        losses=(fmean(first), fmean(last)) if len(losses) > steps else None,
    )


@dataclass(frozen=True)
class _EpochEnd:
    """What happens before the first step and after every epoch: the model is measured and saved.

    Attributes:
        ends: epochs after which the run, or a part of it, ends.
        validation: keeps what was measured; None in a process that does not write.
    """

    task: Task
    keeping: Keeping
    ends: Collection[int]
    world: World
    saver: Saver
    validation: Validation | None

    def __call__(self, epoch: int) -> Mapping[str, float] | None:
        if epoch == 0:
            return self._before()
        metrics = None
        if self.task.evaluate is not None and _due(epoch, self.keeping.val_frequency, self.ends):
            measured = self.task.evaluate()
            metrics = measured.metrics
            log.info("epoch %d: %s", epoch, self.task.headline(metrics))
            if self.validation is not None:
                self.validation.add(epoch, measured)
        if self.world.is_rank0 and _due(epoch, self.keeping.save_frequency, self.ends):
            self.saver.save_epoch(epoch, metrics or {})
        return metrics

    def _before(self) -> Mapping[str, float] | None:
        """What the model reaches as it is; a run that is resumed does not measure it again."""
        if self.task.evaluate is None:
            return None
        validation = self.validation
        known = self.world.on_rank0(lambda: validation.before if validation else None)
        if known is None:
            with _same_random(), _blaming_the_base():
                measured = self.task.evaluate()
            if validation is not None:
                validation.begin(measured)
            known = measured.metrics
        than = validation.record.than if validation else BASE
        log.info("epoch 0, %s: %s", than, self.task.headline(known))
        return known


@contextlib.contextmanager
def _blaming_the_base() -> Iterator[None]:
    """Features that are not finite before the first step cannot be the learning rate's fault."""
    try:
        yield
    except TrainingError as error:
        if type(error) is not TrainingError:  # another process is gone
            raise
        raise TrainingError(
            "features of the validation data are not finite before the first step: likely the base or an "
            "image holds broken values; check --pretrained, or use --precision fp32"
        ) from error


@contextlib.contextmanager
def _same_random() -> Iterator[None]:
    """Random streams are after this as they were before, whatever loaders drew from them."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        yield


def _began(clip: Clip) -> dict[str, str]:
    """Where the adapter was loaded from that a run trains on, for its record."""
    state = lora_state(clip)
    origin = "" if state is None else state.chosen().origin
    return {"started_from": origin} if origin else {}


def choose_trainable(clip: Clip, spec: TrainArgs) -> None:
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


def choose_autocast(choice: bool | None, clip: Clip, out: Path, resume: bool, world: World = ALONE) -> bool:
    """As chosen; else as a resumed run did so far, whatever a measurement says today; else measured."""
    return world.on_rank0(lambda: _choose_autocast(choice, clip, out, resume))


def _choose_autocast(choice: bool | None, clip: Clip, out: Path, resume: bool) -> bool:
    latest = latest_checkpoint(out)
    if choice is None and resume and latest.exists():
        recorded = recorded_settings(latest).get("autocast")
        if isinstance(recorded, bool):
            log.info("computing in %s, as this run did before", "bf16" if recorded else "fp32")
            return recorded
    return use_autocast(choice, clip.device)


def common_settings(
    clip: Clip, spec: TrainArgs, autocast: bool, exact_preprocess: bool, world: World = ALONE
) -> dict[str, Any]:
    """What no kind of run may change before it is resumed, its data aside."""
    state = lora_state(clip)
    return {
        **spec.model_dump(),
        "autocast": autocast,
        "exact_preprocess": exact_preprocess,
        "base": clip.fingerprint,
        "lora": state.chosen().settings.record() if state is not None else None,
        **({} if world.alone else {"processes": world.world_size}),
    }


def _due(epoch: int, frequency: int, ends: Collection[int]) -> bool:
    """Whether it is an epoch's turn; that of the last of every part, be it the run's end or not, always."""
    return epoch in ends or (frequency > 0 and epoch % frequency == 0)
