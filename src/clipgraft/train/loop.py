"""The training loop, the only one, and how Ctrl-C or SIGTERM stops it: between two steps, all saved."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clipgraft.errors import TrainingError
from clipgraft.lora.state import lora_state, verify_gradients
from clipgraft.models.clip import Clip
from clipgraft.models.device import accelerator_random, set_accelerator_random
from clipgraft.progress import open_bar
from clipgraft.train.checkpoint import Position, load_checkpoint, save_checkpoint
from clipgraft.train.distributed import World
from clipgraft.train.feed import Feed, MicroBatch, everywhere
from clipgraft.train.gradient_cache import contrastive_backward
from clipgraft.train.recipes.recipe import Objective
from clipgraft.train.run_folder import RunFolder, SilentFolder
from clipgraft.train.schedule import Schedule
from clipgraft.train.setup import Setup, clamp_logit_scale, set_lr

if TYPE_CHECKING:
    from tqdm import tqdm

EpochEnd = Callable[[int], Mapping[str, float] | None]
log = logging.getLogger("clipgraft")


@dataclass
class Loop:
    """One run: everything the loop reads, as plain values.

    Attributes:
        setup: the model, the options, and the processes that train together; each of them has this loop, and
            rank 0 alone writes.
        trained: what holds all that trains: the model, or the model and more.
        objective: what a step minimises.
        schedule: learning rate by step.
        settings: what a checkpoint must agree with to be resumed.
        epoch_end: called with the number of finished epochs, 0 before the first step of a run; returns
            metrics to report, or None.
        enough: asked after each evaluation with the number of finished epochs: whether to end there.
        began: when this part of the run began, by `time.perf_counter`.
        before: seconds that its earlier parts took, up to the checkpoint that this one goes on from.
    """

    setup: Setup
    trained: nn.Module
    feed: Feed
    objective: Objective
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    settings: Mapping[str, Any] = field(default_factory=dict)
    epoch_end: EpochEnd = lambda epoch: None
    enough: Callable[[int], bool] = lambda epoch: False
    began: float = field(default_factory=time.perf_counter)
    before: float = 0.0

    @property
    def clip(self) -> Clip:
        return self.setup.clip

    @property
    def world(self) -> World:
        return self.setup.world

    @property
    def epochs(self) -> int:
        return self.setup.train.planned_epochs

    def seconds(self) -> float:
        """Of all parts of the run so far."""
        return self.before + time.perf_counter() - self.began

    def trained_weights(self) -> int:
        """How many weights some step has moved; those that never got a gradient are left out."""
        return sum(parameter.numel() for parameter in self.optimizer.state)

    def run(self, folder: RunFolder | SilentFolder, resume: bool = False) -> None:
        """Train to the last epoch, or to the one that is `enough`; all that it writes is in `folder`.

        Raises:
            TrainingError: the loss is not finite, or gradients are where they must not be.
            CheckpointError: a checkpoint to resume from does not fit.
            Interrupted: after a first SIGINT or SIGTERM; the checkpoint is written.
        """
        position = self._start(folder, resume)
        with stop_requests(quiet=not self.world.alone) as stop:
            if position.step == 0:
                self._evaluate(folder, 0, position, stop)
            for epoch in range(position.epoch, self.epochs):
                position = self._epoch(folder, epoch, position, stop)
                self._evaluate(folder, epoch + 1, position, stop)
                if self.enough(epoch + 1):
                    break

    def _evaluate(
        self, folder: RunFolder | SilentFolder, epochs: int, position: Position, stop: threading.Event
    ) -> None:
        """Report what the model reaches after so many epochs."""
        with self._ended_by(stop, position):
            metrics = self.epoch_end(epochs)
        if metrics is not None:
            folder.event("val", position.step, {"epoch": epochs, **metrics})
        if self._to_stop(stop) and position.epoch < self.epochs:
            raise self._interrupted(position)

    def _start(self, folder: RunFolder | SilentFolder, resume: bool) -> Position:
        position = Position()
        if resume and self.world.on_rank0(folder.latest.exists):
            position = load_checkpoint(folder.latest, self.trained, self.optimizer, self.settings)
            self.before = folder.seconds()
            log.info("resuming after step %d of %d", position.step, self.feed.steps * self.epochs)
        elif resume:
            log.info("%s has no checkpoint yet: starting at the first step", folder.path)
        folder.start(position)
        # They are the same already, up to what was computed from data.
        self.world.send(p for p in self.trained.parameters() if p.requires_grad)
        return position

    def _to_stop(self, stop: threading.Event) -> bool:
        """Whether any process was asked to stop; then all of them are.

        A signal that comes while they ask each other counts at the next time.
        """
        agreed = self.world.any(stop.is_set())
        if agreed:
            stop.set()
        return agreed

    def _epoch(
        self, folder: RunFolder | SilentFolder, epoch: int, position: Position, stop: threading.Event
    ) -> Position:
        self.trained.train()
        start = position.step_in_epoch
        batches, every = self.feed.batches(epoch, start), self.setup.run.checkpoint_steps
        with contextlib.closing(batches), self._bar(epoch, start) as bar:
            readings = Readings(folder, bar, self.clip.device)
            for number, batch in enumerate(self._until(stop, batches), start=start + 1):
                position = Position(epoch, number, position.step + 1)
                lr, loss = self.step(batch, position.step)
                readings.add(_Step(position.step, lr, self._pairs(batch), loss, self._temperature()))
                if number < self.feed.steps and every and position.step % every == 0:
                    readings.read()
                    self._checkpoint(folder, position)
            readings.read()
        # Before the evaluation: it may be long, and a run that goes on from here repeats it.
        self._checkpoint(folder, position)
        if self._to_stop(stop):
            raise self._interrupted(position)
        if readings.losses:
            mean = sum(readings.losses) / len(readings.losses)
            log.info("epoch %d of %d: mean loss %.4f", epoch + 1, self.epochs, mean)
        return Position(epoch + 1, 0, position.step)

    def step(self, batch: list[MicroBatch], number: int) -> tuple[float, Tensor]:
        """Take step `number`, counted from 1; its learning rate, and the loss before it."""
        lr = self.schedule(number - 1)
        set_lr(self.optimizer, lr)
        self.optimizer.zero_grad(set_to_none=True)
        self.world.reseed(self.setup.train.seed, number)
        loss_of = self.objective.loss(everywhere(batch, self.world))
        try:
            loss = contrastive_backward(self.objective.parts(batch), loss_of, self.world)
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"out of GPU memory at step {number}: halve `batch_size` and double `accum_freq`, "
                "which changes nothing else, or add `grad_checkpointing`"
            ) from error
        if self.clip.device.type == "cpu" and not math.isfinite(loss):
            # Before the update, so that what a library user holds is not spoilt; elsewhere reading it costs.
            raise not_finite(number, lr, float(loss))
        trainable = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.world.sum_gradients(trainable)
        if number == 1 and lora_state(self.clip) is not None:
            verify_gradients(self.clip)
        if (norm := self.setup.train.grad_clip_norm) is not None:
            torch.nn.utils.clip_grad_norm_(trainable, norm)
        self.optimizer.step()
        # The fused AdamW does not (torch 2.14), and who keeps bf16 copies of weights goes by their versions.
        torch.autograd.graph.increment_version(trainable)
        if self.setup.train.loss != "sigmoid":
            # Published SigLIP models are above CLIP's limit, at 112: it would change them at the first step.
            clamp_logit_scale(self.clip.logit_scale)
        self.world.send(running_statistics(self.trained))
        return lr, loss

    def _temperature(self) -> dict[str, Tensor]:
        """What the loss multiplies cosines with, and what it adds to them if it does."""
        values = {"logit_scale": self.clip.logit_scale.detach().exp()}
        bias = self.clip.logit_bias
        if bias is not None and self.setup.train.loss == "sigmoid":
            values["logit_bias"] = bias.detach().clone()
        return values

    def _checkpoint(self, folder: RunFolder | SilentFolder, position: Position) -> None:
        if self.world.is_rank0:
            save_checkpoint(folder.latest, self.trained, self.optimizer, position, self.settings)
            folder.keep_seconds(self.seconds())
        self.world.barrier()  # nobody is to say that it is saved before it is

    def _interrupted(self, position: Position) -> Interrupted:
        return Interrupted(f"stopped and saved after step {position.step} of {self.feed.steps * self.epochs}")

    @contextlib.contextmanager
    def _ended_by(self, stop: threading.Event, position: Position) -> Iterator[None]:
        """An evaluation whose loader the request to stop has ended is no error."""
        try:
            yield
        except RuntimeError:
            if not stop.is_set():
                raise
            raise self._interrupted(position) from None

    def _bar(self, epoch: int, start: int) -> tqdm[Any]:
        shows = None if self.setup.shows else False
        what = f"epoch {epoch + 1}/{self.epochs}"
        return open_bar(what, "step", self.feed.steps, initial=start, shows=shows)

    def _pairs(self, batch: Sequence[MicroBatch]) -> int:
        """Of all processes."""
        return self.world.world_size * sum(len(part.image_ids) for part in batch)

    def _until(
        self, stop: threading.Event, batches: Iterator[list[MicroBatch]]
    ) -> Iterator[list[MicroBatch]]:
        """The batches, up to a request to stop; a loader that the same signal has ended is no error."""
        while True:
            batch = None
            if not stop.is_set():
                try:
                    batch = next(batches, None)
                except RuntimeError:
                    if not stop.is_set():
                        raise
            if self._to_stop(stop) or batch is None:
                return
            yield batch


def running_statistics(model: nn.Module) -> list[Tensor]:
    """What batch norms keep of the batches they see, which is of this process's alone."""
    norms = (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
    return [buffer for norm in norms for buffer in norm.buffers()]


@contextlib.contextmanager
def same_random() -> Iterator[None]:
    """Random streams are after this as they were before, whatever loaders drew from them."""
    states = accelerator_random()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        set_accelerator_random(states)


_STEPS_BETWEEN_READINGS = 25
"""On a GPU: reading a number waits for every step that was queued before it."""


@dataclass(frozen=True)
class _Step:
    """What is reported of a step, counted from 1."""

    number: int
    lr: float
    pairs: int
    loss: Tensor
    temperature: dict[str, Tensor]


class Readings:
    """Loss and temperature of an epoch's steps, written to the run folder in order.

    Attributes:
        losses: of all steps read so far.
    """

    def __init__(self, folder: RunFolder | SilentFolder, bar: tqdm[object], device: torch.device) -> None:
        self.losses: list[float] = []
        self._folder = folder
        self._bar = bar
        self._every = 1 if device.type == "cpu" else _STEPS_BETWEEN_READINGS
        self._pending: list[_Step] = []
        self._since = time.perf_counter()

    def add(self, step: _Step) -> None:
        """Note a step; scalars stay on the device until they are read.

        Raises:
            TrainingError: a loss that was read is not finite.
        """
        self._pending.append(step)
        if len(self._pending) >= self._every:
            self.read()

    def read(self) -> None:
        """Read, check and write what is pending."""
        if not self._pending:
            return
        rows = [
            torch.stack([value.float().squeeze() for value in (step.loss, *step.temperature.values())])
            for step in self._pending
        ]
        values = torch.stack(rows).tolist()
        now = time.perf_counter()
        speed = sum(step.pairs for step in self._pending) / (now - self._since)
        for step, (loss, *temperature) in zip(self._pending, values, strict=True):
            if not math.isfinite(loss):
                raise not_finite(step.number, step.lr, loss)
            logits = dict(zip(step.temperature, temperature, strict=True))
            event = {"loss": loss, "lr": step.lr, **logits, "pairs_per_second": speed}
            self._folder.event("train", step.number, event)
            self.losses.append(loss)
        self._bar.set_postfix({"loss": f"{self.losses[-1]:.3f}", "images/s": f"{speed:.0f}"}, refresh=False)
        self._bar.update(len(self._pending))
        self._pending = []
        self._since = now


def not_finite(number: int, lr: float, loss: float) -> TrainingError:
    """Why a loss is not finite at step `number`: before the first update it cannot be the learning rate."""
    cause = f"the learning rate ({lr:g}) is too high; lower `lr`, raise `warmup`, or add `grad_clip_norm=1`"
    if number == 1:
        cause = "the base or an image holds broken values; check `pretrained`, or use `autocast=False`"
    return TrainingError(f"the loss is {loss} at step {number}: likely {cause}")


_NOTICE = b"\nstopping after this step, then saving; once more stops at once, without saving\n"
_REQUESTS = (signal.SIGINT, signal.SIGTERM)
# A terminal or job scheduler signals the loader's processes too, and when one of them dies torch raises,
# wherever the step is. Windows has no such signal.
_CHILD_DIED = (signal.SIGCHLD,) if hasattr(signal, "SIGCHLD") else ()


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop, has saved itself, and can be resumed. No `except Exception` catches it.

    Attributes:
        signal: which one asked last; the command ends with 128 and its number, as shells have it.
    """

    signal: int = signal.SIGINT


@contextlib.contextmanager
def stop_requests(quiet: bool = False) -> Iterator[threading.Event]:
    """Yield an event that the first SIGINT or SIGTERM sets; the second one acts as if this were not here.

    The first one prints a notice, unless `quiet`. Outside the main thread no signal arrives, and the
    event is never set.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before: dict[signal.Signals, Any] = {kind: signal.getsignal(kind) for kind in _REQUESTS}
    owner = os.getpid()

    def request(kind: int, _: object) -> None:
        if os.getpid() != owner:  # a loader's process that inherited this handler: its owner ends it
            return
        stop.set()
        Interrupted.signal = kind
        if not quiet:
            os.write(2, _NOTICE)  # what print and logging use may be locked by the code this interrupts
        _set(before)
        for child in _CHILD_DIED:
            before[child] = signal.signal(child, signal.SIG_DFL)

    _set(dict.fromkeys(_REQUESTS, request))
    try:
        yield stop
    finally:
        _set(before)


def _set(handlers: dict[signal.Signals, Any]) -> None:
    for kind, handler in handlers.items():
        signal.signal(kind, handler)
