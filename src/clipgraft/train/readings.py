"""What each step reports, read from the device only as often as that costs nothing."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from clipgraft.errors import TrainingError
from clipgraft.train.run_folder import RunFolder, SilentFolder

_STEPS_BETWEEN_READINGS = 25
"""On a GPU: reading a number waits for every step that was queued before it."""


@dataclass(frozen=True)
class _Step:
    number: int
    lr: float
    pairs: int
    loss: Tensor
    logit_scale: Tensor


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

    def add(self, number: int, lr: float, pairs: int, loss: Tensor, logit_scale: Tensor) -> None:
        """Note a step, counted from 1; scalars stay on the device until they are read.

        Raises:
            TrainingError: a loss that was read is not finite.
        """
        self._pending.append(_Step(number, lr, pairs, loss.detach(), logit_scale.detach().exp()))
        if len(self._pending) >= self._every:
            self.read()

    def read(self) -> None:
        """Read, check and write what is pending."""
        if not self._pending:
            return
        rows = [
            torch.stack([step.loss.float(), step.logit_scale.float().squeeze()]) for step in self._pending
        ]
        values = torch.stack(rows).tolist()
        now = time.perf_counter()
        speed = sum(step.pairs for step in self._pending) / (now - self._since)
        for step, (loss, scale) in zip(self._pending, values, strict=True):
            if not math.isfinite(loss):
                raise not_finite(step.number, step.lr, loss)
            event = {"loss": loss, "lr": step.lr, "logit_scale": scale, "pairs_per_second": speed}
            self._folder.event("train", step.number, event)
            self.losses.append(loss)
        self._bar.set_postfix({"loss": f"{self.losses[-1]:.3f}", "images/s": f"{speed:.0f}"}, refresh=False)
        self._bar.update(len(self._pending))
        self._pending = []
        self._since = now


def not_finite(number: int, lr: float, loss: float) -> TrainingError:
    """Why a loss is not finite at step `number`: before the first update it cannot be the learning rate."""
    cause = f"the learning rate ({lr:g}) is too high; lower --lr, raise --warmup, or add --grad-clip-norm 1"
    if number == 1:
        cause = "the base or an image holds broken values; check --pretrained, or use --precision fp32"
    return TrainingError(f"the loss is {loss} at step {number}: likely {cause}")
