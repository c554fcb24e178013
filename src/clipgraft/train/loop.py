"""The training loop: the only one."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from clipgraft.errors import TrainingError
from clipgraft.lora.inject import lora_state, verify_gradients
from clipgraft.models.clip import Clip
from clipgraft.train.accumulate import Encode, contrastive_backward
from clipgraft.train.checkpoint import Position, load_checkpoint, save_checkpoint
from clipgraft.train.feed import Batch, Feed
from clipgraft.train.objective import contrastive_loss
from clipgraft.train.optim import Schedule, clamp_logit_scale, set_lr
from clipgraft.train.run_folder import RunFolder
from clipgraft.train.towers import Tower

EpochEnd = Callable[[int], Mapping[str, float] | None]


class Interrupted(Exception):  # noqa: N818 - not an error: the run was asked to stop and has saved itself
    """The run was stopped by a signal and can be resumed."""

    def __init__(self, position: Position) -> None:
        super().__init__(f"stopped after epoch {position.epoch}, step {position.step_in_epoch}")
        self.position = position


@dataclass
class Loop:
    """One run: everything the loop reads, as plain values.

    Attributes:
        images, texts: what each tower gives for a batch.
        schedule: learning rate by step.
        accum_freq: micro-batches of a step.
        settings: what a checkpoint must agree with to be resumed.
        epoch_end: called with the number of finished epochs; returns metrics to report, or None.
    """

    clip: Clip
    feed: Feed
    images: Tower
    texts: Tower
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    epochs: int
    accum_freq: int = 1
    grad_clip_norm: float | None = None
    checkpoint_steps: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    epoch_end: EpochEnd = lambda epoch: None
    progress: bool = True

    def run(self, folder: RunFolder, resume: bool = False) -> list[dict[str, float]]:
        """Train to the last epoch.

        Returns:
            The metrics of every epoch that was evaluated in this call, with its number under `epoch`.

        Raises:
            TrainingError: the loss is not finite, or gradients are where they must not be.
            CheckpointError: a checkpoint to resume from does not fit.
            Interrupted: after a first SIGINT or SIGTERM; the checkpoint is written.
        """
        position = Position()
        if resume and folder.latest.exists():
            position = load_checkpoint(folder.latest, self.clip.model, self.optimizer, self.settings)
            folder.rewind(position.step)
        history: list[dict[str, float]] = []
        with _stop_requests() as stop:
            for epoch in range(position.epoch, self.epochs):
                position = self._epoch(folder, epoch, position, stop)
                metrics = self.epoch_end(epoch + 1)
                if metrics is not None:
                    folder.event("val", position.step, metrics)
                    history.append({"epoch": epoch + 1, **metrics})
                self._checkpoint(folder, position)
        return history

    def _epoch(self, folder: RunFolder, epoch: int, position: Position, stop: threading.Event) -> Position:
        self.clip.train()
        start = position.step_in_epoch
        bar = tqdm(
            desc=f"epoch {epoch + 1}/{self.epochs}",
            total=self.feed.steps,
            initial=start,
            unit="step",
            disable=not self.progress,
        )
        with bar, contextlib.closing(self.feed.batches(epoch, start)) as batches:
            for number, batch in enumerate(batches, start=start + 1):
                values = self._step(batch, position.step)
                position = Position(epoch, number, position.step + 1)
                folder.event("train", position.step, values)
                bar.set_postfix(loss=f"{values['loss']:.3f}", pairs_s=f"{values['pairs_per_second']:.0f}")
                bar.update()
                if stop.is_set():
                    self._checkpoint(folder, position)
                    raise Interrupted(position)
                if self.checkpoint_steps and position.step % self.checkpoint_steps == 0:
                    self._checkpoint(folder, position)
        return Position(epoch + 1, 0, position.step)

    def _step(self, batch: Batch, step: int) -> dict[str, float]:
        started = time.perf_counter()
        lr = self.schedule(step)
        set_lr(self.optimizer, lr)
        self.optimizer.zero_grad(set_to_none=True)
        loss = contrastive_backward(self._micro_batches(batch), self._loss(batch)).item()
        if not torch.isfinite(torch.tensor(loss)):
            raise TrainingError(
                f"the loss is {loss} at step {step + 1}: likely the learning rate ({lr:g}) is too high or "
                "the images hold broken values; lower --lr, add --grad-clip-norm 1, or use --precision fp32"
            )
        if step == 0 and lora_state(self.clip) is not None:
            verify_gradients(self.clip)
        if self.grad_clip_norm is not None:
            trainable = [p for group in self.optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(trainable, self.grad_clip_norm)
        self.optimizer.step()
        clamp_logit_scale(self.clip.logit_scale)
        seconds = time.perf_counter() - started
        return {
            "loss": loss,
            "lr": lr,
            "logit_scale": self.clip.logit_scale.exp().item(),
            "pairs_per_second": len(batch.image_ids) / seconds,
        }

    def _micro_batches(self, batch: Batch) -> list[Encode]:
        def encode(part: Batch) -> Encode:
            return lambda: (
                self.images(part.image_ids, part.pixels).to(self.clip.device),
                self.texts(part.caption_ids, part.pixels).to(self.clip.device),
            )

        return [encode(part) for part in batch.split(self.accum_freq)]

    def _loss(self, batch: Batch) -> Callable[[Tensor, Tensor], Tensor]:
        device = self.clip.device
        image_ids, caption_ids = batch.image_ids.to(device), batch.caption_ids.to(device)
        return lambda images, texts: contrastive_loss(
            images, texts, self.clip.logit_scale, image_ids, caption_ids
        )

    def _checkpoint(self, folder: RunFolder, position: Position) -> None:
        save_checkpoint(folder.latest, self.clip.model, self.optimizer, position, self.settings)


@contextlib.contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """The first SIGINT or SIGTERM asks the loop to stop after the running step; the second one kills."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = {kind: signal.getsignal(kind) for kind in kinds}

    def request(kind: int, _: object) -> None:
        stop.set()
        for number in kinds:
            signal.signal(number, before[number])

    for kind in kinds:
        signal.signal(kind, request)
    try:
        yield stop
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
