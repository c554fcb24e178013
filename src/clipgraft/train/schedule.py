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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from clipgraft.errors import CheckpointError, together
from clipgraft.train.args import RunArgs, TrainArgs
from clipgraft.train.checkpoint import EPOCHS, PARTS, recorded_parts, recorded_position, recorded_settings
from clipgraft.train.distributed import ALONE, World
from clipgraft.train.run_folder import latest_checkpoint

log = logging.getLogger("clipgraft")
Schedule: TypeAlias = Callable[[int], float]


def plan_epochs(asked: TrainArgs, run: RunArgs, rows: int, world: World = ALONE) -> TrainArgs:
    """The options of a run on that many pairs; of one that is resumed with the parts it has had so far.

    More epochs than the run was to have are one more part. Where `epochs` is not given, a resumed run has
    those it was to have.

    Raises:
        ConfigError: options that do not go together.
        CheckpointError: fewer epochs than the run has done or was to have, or other parts than it has had.
    """
    _check(asked)
    parts = world.on_rank0(lambda: _parts(asked, run, rows, world))
    planned = asked.replace(**{EPOCHS: sum(parts), PARTS: parts if len(parts) > 1 else None})
    _check(planned)
    return planned


def _check(args: TrainArgs) -> None:
    if faults := args.epoch_faults():
        raise together(faults)


def schedule_of(args: TrainArgs, steps_per_epoch: int) -> Schedule:
    """Learning rate by step of the whole run, counted from 0, part after part."""
    starts, schedules = [], []
    for number, epochs in enumerate(args.parts):
        starts.append(steps_per_epoch * sum(args.parts[:number]))
        schedules.append(_schedule(args, epochs, steps_per_epoch, first=number == 0))

    def at(step: int) -> float:
        number = max(n for n, start in enumerate(starts) if start <= step)
        return schedules[number](step - starts[number])

    return at


def _schedule(args: TrainArgs, epochs: int, steps_per_epoch: int, *, first: bool) -> Schedule:
    total = steps_per_epoch * epochs
    warmup = min(args.warmup, total // 10) if first else 0
    if first and warmup < args.warmup and "warmup" in args.model_fields_set:
        log.info("warmup: %d of this run's %d steps, instead of %d", warmup, total, args.warmup)
    cooldown = (args.epochs_cooldown or 0) * steps_per_epoch
    end, power = args.lr_cooldown_end, args.lr_cooldown_power
    return make_schedule(args.lr_scheduler, args.peak_lr, warmup, total, cooldown, end, power, args.lr_end)


def _parts(args: TrainArgs, run: RunArgs, rows: int, world: World) -> tuple[int, ...]:
    out, latest = run.out, latest_checkpoint(run.out)
    before = recorded_parts(recorded_settings(latest)) if run.resume and latest.exists() else None
    if before is None:
        settled = args.for_pairs(rows, world.world_size)
        if args.epochs == "auto" and args.epoch_parts is None and args.steps is None:
            log.info("`epochs=auto` takes %d, by the number of pairs (%s)", settled.epochs, f"{rows:,}")
        return settled.parts
    if args.epoch_parts is not None:
        if args.epoch_parts[: len(before)] != before:
            raise CheckpointError(
                f"{out} has epochs in parts of {_listed(before)}, and `epoch_parts` says "
                f"{_listed(args.epoch_parts)}: begin with the parts it has, or choose a new `out`"
            )
        return args.epoch_parts
    planned, asked = sum(before), args.epochs
    if asked == "auto" or asked == planned:
        return before
    if asked < planned:
        raise CheckpointError(_too_few(out, asked, planned, recorded_position(latest).epoch))
    added, told = asked - planned, _told(args, planned + 1)
    log.info("%s was to have %s: %d more follow, %s", out, _epochs(planned), added, told)
    return (*before, asked - planned)


def _too_few(out: Path, asked: int, planned: int, done: int) -> str:
    if asked <= done:
        return (
            f"`epochs={asked}`: {out} has done {_epochs(done)} already; ask for {planned} or more, or choose "
            "a new `out`"
        )
    return (
        f"`epochs={asked}`: {out} is under way to {_epochs(planned)}, and its learning rate with it; ask for "
        f"{planned} or more, or choose a new `out`"
    )


def _told(args: TrainArgs, first: int) -> str:
    """The learning rate of an added part, in words."""
    rate = "what was found" if isinstance(args.lr, str) else f"{args.lr:g}"
    if args.lr_scheduler == "const":
        return f"with the same learning rate, {rate}"
    end = args.lr_end if args.lr_scheduler == "cosine" else args.lr_cooldown_end
    how = "by a cosine" if args.lr_scheduler == "cosine" else f"over the last {args.epochs_cooldown} epochs"
    return f"for which the learning rate starts at {rate} again in epoch {first} and falls to {end:g} {how}"


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
    cosine_end: float = 0.0,
) -> Schedule:
    """Learning rate by step, counted from 0: linear warmup, then `kind`.

    `cosine` falls to `cosine_end` at `total_steps`; `const` stays; `const-cooldown` stays and falls to
    `cooldown_end` over the last `cooldown_steps` as (remaining share) ** `cooldown_power`.
    """

    def at(step: int) -> float:
        if step < warmup:
            return lr * (step + 1) / warmup
        if kind == "cosine":
            progress = (step - warmup) / max(1, total_steps - warmup)
            return cosine_end + 0.5 * (lr - cosine_end) * (1 + math.cos(math.pi * progress))
        start = total_steps - cooldown_steps
        if kind == "const-cooldown" and step >= start:
            remaining = 1 - (step - start) / max(1, cooldown_steps)
            return cooldown_end + (lr - cooldown_end) * float(remaining**cooldown_power)
        return lr

    return at
