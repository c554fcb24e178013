"""The parts of a run: epochs that are added to a run are one more part, with a learning rate of its own.

Every part follows the run's schedule as if it were a run by itself, from the peak learning rate on and
without warmup but in the first. What a step does then depends on the parts alone, and not on when they were
asked for: ten epochs that are later extended to twenty are, to the bit, the run that asks for
`epoch_parts=(10, 10)` at once; with a constant learning rate and no warmup also the one that asks for twenty.
Of twenty epochs under one cosine, which falls to zero at the twentieth, they are another run.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeAlias

from clipgraft.errors import CheckpointError, together
from clipgraft.train.args import TrainArgs
from clipgraft.train.checkpoint import EPOCHS, PARTS, recorded_parts, recorded_position, recorded_settings
from clipgraft.train.distributed import ALONE, World
from clipgraft.train.run_folder import latest_checkpoint

log = logging.getLogger("clipgraft")
Schedule: TypeAlias = Callable[[int], float]


def plan_epochs(options: Mapping[str, Any], out: Path, resume: bool, world: World = ALONE) -> TrainArgs:
    """The spec of a run from its options; of one that is resumed with the parts it has had so far.

    More epochs than the run was to have are one more part. Without `epochs` it has those it was to have.

    Raises:
        ConfigError: options out of range.
        CheckpointError: fewer epochs than the run has done or was to have, or other parts than it has had.
    """
    asked = TrainArgs(**options)
    _check(asked)
    parts = world.on_rank0(lambda: _parts(asked, out, resume))
    spec = asked.model_copy(update={EPOCHS: sum(parts), PARTS: parts if len(parts) > 1 else None})
    _check(spec)
    return spec


def _check(spec: TrainArgs) -> None:
    if faults := spec.epoch_faults():
        raise together(faults)


def parts_of(spec: TrainArgs) -> tuple[int, ...]:
    """Epochs of each part, in order."""
    return spec.epoch_parts or (spec.epochs,)


def part_ends(spec: TrainArgs) -> frozenset[int]:
    """The number of finished epochs at the end of each part."""
    return frozenset(accumulate(parts_of(spec)))


def schedule_of(spec: TrainArgs, steps_per_epoch: int) -> Schedule:
    """Learning rate by step of the whole run, counted from 0, part after part."""
    starts, schedules = [], []
    for number, epochs in enumerate(parts_of(spec)):
        starts.append(steps_per_epoch * sum(parts_of(spec)[:number]))
        schedules.append(_schedule(spec, epochs, steps_per_epoch, first=number == 0))

    def at(step: int) -> float:
        number = max(n for n, start in enumerate(starts) if start <= step)
        return schedules[number](step - starts[number])

    return at


def _schedule(spec: TrainArgs, epochs: int, steps_per_epoch: int, *, first: bool) -> Schedule:
    total = steps_per_epoch * epochs
    warmup = min(spec.warmup, total // 10) if first else 0
    if first and warmup < spec.warmup:
        log.info("warmup: %d of this run's %d steps, instead of %d", warmup, total, spec.warmup)
    cooldown = (spec.epochs_cooldown or 0) * steps_per_epoch
    return make_schedule(
        spec.lr_scheduler, spec.lr, warmup, total, cooldown, spec.lr_cooldown_end, spec.lr_cooldown_power
    )


def _parts(spec: TrainArgs, out: Path, resume: bool) -> tuple[int, ...]:
    latest = latest_checkpoint(out)
    if not (resume and latest.exists()):
        return parts_of(spec)
    before = recorded_parts(recorded_settings(latest))
    if before is None:
        return parts_of(spec)
    if spec.epoch_parts is not None:
        if spec.epoch_parts[: len(before)] != before:
            raise CheckpointError(
                f"{out} has epochs in parts of {_listed(before)}, and --epoch-parts says "
                f"{_listed(spec.epoch_parts)}: begin with the parts it has, or choose a new --name"
            )
        return spec.epoch_parts
    planned, asked = sum(before), spec.epochs
    if EPOCHS not in spec.model_fields_set or asked == planned:
        return before
    if asked < planned:
        raise CheckpointError(_too_few(out, asked, planned, recorded_position(latest).epoch))
    log.info(
        "%s was to have %s: %d more follow, %s",
        out,
        _epochs(planned),
        asked - planned,
        _told(spec, planned + 1),
    )
    return (*before, asked - planned)


def _too_few(out: Path, asked: int, planned: int, done: int) -> str:
    if asked <= done:
        return (
            f"--epochs {asked}: {out} has done {_epochs(done)} already; ask for {planned} or more, or choose "
            "a new --name"
        )
    return (
        f"--epochs {asked}: {out} is under way to {_epochs(planned)}, and its learning rate with it; ask for "
        f"{planned} or more, or choose a new --name"
    )


def _told(spec: TrainArgs, first: int) -> str:
    """The learning rate of an added part, in words."""
    if spec.lr_scheduler == "const":
        return f"with the same learning rate, {spec.lr:g}"
    end = 0.0 if spec.lr_scheduler == "cosine" else spec.lr_cooldown_end
    how = "by a cosine" if spec.lr_scheduler == "cosine" else f"over the last {spec.epochs_cooldown} epochs"
    return (
        f"for which the learning rate starts at {spec.lr:g} again in epoch {first} and falls to {end:g} {how}"
    )


def _epochs(number: int) -> str:
    return f"{number} epoch{'s' * (number > 1)}"


def _listed(parts: Sequence[int]) -> str:
    return " + ".join(map(str, parts))


def make_schedule(
    kind: str,
    lr: float,
    warmup: int,
    total_steps: int,
    cooldown_steps: int = 0,
    cooldown_end: float = 0.0,
    cooldown_power: float = 1.0,
) -> Schedule:
    """Learning rate by step, counted from 0: linear warmup, then `kind`.

    `cosine` falls to zero at `total_steps`; `const` stays; `const-cooldown` stays and falls to
    `cooldown_end` over the last `cooldown_steps` as (remaining share) ** `cooldown_power`.
    """

    def at(step: int) -> float:
        if step < warmup:
            return lr * (step + 1) / warmup
        if kind == "cosine":
            progress = (step - warmup) / max(1, total_steps - warmup)
            return 0.5 * lr * (1 + math.cos(math.pi * progress))
        start = total_steps - cooldown_steps
        if kind == "const-cooldown" and step >= start:
            remaining = 1 - (step - start) / max(1, cooldown_steps)
            return cooldown_end + (lr - cooldown_end) * float(remaining**cooldown_power)
        return lr

    return at
