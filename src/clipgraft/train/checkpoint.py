"""Training checkpoints: all that a run needs to go on to the same bits, in one file that is always whole."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, InstanceOf
from torch import Tensor, nn

from clipgraft.errors import CheckpointError
from clipgraft.files import atomic_path
from clipgraft.models.device import accelerator_random, set_accelerator_random
from clipgraft.records import Whole, read_pt
from clipgraft.shown import one_line
from clipgraft.writing import size_of

log = logging.getLogger("clipgraft")
LATEST = "latest.pt"
FORMAT_VERSION = 1
EPOCHS, PARTS = "epochs", "epoch_parts"
_SHARING = ("batch_size", "accum_freq", "processes")
_MOMENTS = ("exp_avg", "exp_avg_sq")
_OF_THEN = {"loss": "softmax", "norms_only": False, "lr_end": 0.0}
"""What runs had that were begun before these were options."""
_AGAIN = "start the run again under another `out`"
_OTHER = "holds other trainable weights than this model has: resume with the run's own model"


@dataclass(frozen=True)
class Position:
    """Where a run stands: finished epochs, finished steps of the running epoch, and steps in all.

    An epoch is finished when it has been evaluated, not with its last step.
    """

    epoch: Whole = 0
    step_in_epoch: Whole = 0
    step: Whole = 0


@dataclass(frozen=True)
class _Group:
    """Which weights it has, and their last rate; how they are trained is in the run's settings."""

    params: list[Whole]
    lr: Annotated[float, Field(strict=True, ge=0, le=1e9)]


@dataclass(frozen=True)
class _Optimizer:
    """An optimizer's `state_dict`."""

    state: dict[Whole, dict[str, InstanceOf[Tensor]]]
    param_groups: list[_Group]


@dataclass(frozen=True)
class _State:
    """What a checkpoint holds; `cuda_random` is that of GPUs of any make."""

    format: Annotated[int, Field(strict=True, ge=FORMAT_VERSION, le=FORMAT_VERSION)]
    position: Position
    settings: dict[str, Any]
    weights: dict[str, InstanceOf[Tensor]]
    buffers: dict[str, InstanceOf[Tensor]]
    optimizer: _Optimizer
    random: InstanceOf[Tensor]
    cuda_random: list[InstanceOf[Tensor]]


def save_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    position: Position,
    settings: Mapping[str, Any],
) -> None:
    """Write what changes in training, position and random states; an older file is replaced whole.

    Raises:
        WriteError: the file cannot be written; the older one is as it was.
    """
    state = {
        "format": FORMAT_VERSION,
        "position": vars(position),
        "settings": dict(settings),
        "weights": {name: p.detach() for name, p in _trainable(model).items()},
        "buffers": _buffers(model),
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "cuda_random": accelerator_random(),
    }
    with atomic_path(path, size_of(state)) as temporary:
        torch.save(state, temporary)


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, settings: Mapping[str, Any]
) -> Position:
    """Put a run back where its checkpoint was written.

    Raises:
        CheckpointError: no such file, not readable, of another model, or made with other settings.
    """
    state = _read(path)
    _same_settings(path, state.settings, settings)
    _require_alike(path, state, model)
    moments = _moments(path, state.optimizer, optimizer)
    try:
        torch.set_rng_state(state.random)
        set_accelerator_random(state.cuda_random)
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(f"{path}: random is no state of torch's random numbers; {_AGAIN}") from error
    _copy(state, model)
    optimizer.load_state_dict(moments)
    return state.position


def load_weights(path: Path, model: nn.Module) -> None:
    """Give a model the trained weights of a checkpoint, and nothing else of it.

    Raises:
        CheckpointError: no such file, not readable, or of another model.
    """
    state = _read(path)
    _require_alike(path, state, model)
    _copy(state, model)


def recorded_settings(path: Path) -> dict[str, Any]:
    """The settings of the run that wrote a checkpoint; its weights are not read. Raises CheckpointError."""
    return dict(_read(path, whole=False).settings)


def recorded_position(path: Path) -> Position:
    """Where the run stood that wrote a checkpoint; its weights are not read. Raises CheckpointError.

    `epoch` counts one whose steps are all done, though it may not have been evaluated, but for the first.
    """
    position = _read(path, whole=False).position
    ends = position.epoch > 0 and position.step == (position.epoch + 1) * position.step_in_epoch
    return replace(position, epoch=position.epoch + 1) if ends else position


def recorded_parts(settings: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Epochs of each part of a run by its settings; None if they say nothing that can be used."""
    parts = settings.get(PARTS) or (settings.get(EPOCHS),)
    if not isinstance(parts, list | tuple) or not all(type(n) is int and n > 0 for n in parts):
        return None
    return tuple(int(n) for n in parts)


def _without_epochs(
    saved: Mapping[str, Any], now: Mapping[str, Any]
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Settings without their epochs, if those of the run so far are the beginning of those it is to have."""
    before, after = recorded_parts(saved), recorded_parts(now)
    if before is None or after is None or after[: len(before)] != before:
        return saved, now
    first, second = (
        {key: value for key, value in settings.items() if key not in (EPOCHS, PARTS)}
        for settings in (saved, now)
    )
    return first, second


def _by_step(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in which the pairs of a step count, and not how processes and micro-batches share them."""
    kept = {key: value for key, value in settings.items() if key not in _SHARING}
    step = math.prod(n for key in _SHARING if isinstance(n := settings.get(key), int))
    return {**kept, "pairs in a step": step}


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """What changes without a gradient: the running statistics of batch norms."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in parameters}


def _require_alike(path: Path, state: _State, model: nn.Module) -> None:
    if not (_alike(state.weights, _trainable(model)) and _alike(state.buffers, _buffers(model))):
        raise CheckpointError(f"{path} {_OTHER}")


def _alike(saved: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> bool:
    """Whether tensors have the names, shapes and types of others, and hold all their values."""
    return saved.keys() == into.keys() and all(
        t.shape == saved[name].shape and t.dtype == saved[name].dtype and _whole(saved[name])
        for name, t in into.items()
    )


def _whole(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.device.type == "cpu"


def _copy(state: _State, model: nn.Module) -> None:
    with torch.no_grad():
        for saved, into in ((state.weights, _trainable(model)), (state.buffers, _buffers(model))):
            for name, tensor in into.items():
                tensor.copy_(saved[name])


def _moments(path: Path, saved: _Optimizer, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """AdamW's state as saved, for the groups as they are now: the run's settings have made the same ones.

    Raises:
        CheckpointError: it is not that of these weights.
    """
    groups = optimizer.state_dict()["param_groups"]
    if [group.params for group in saved.param_groups] != [group["params"] for group in groups]:
        raise CheckpointError(f"{path} {_OTHER}")
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for number, parts in saved.state.items():
        known = number < len(weights) and parts.keys() >= {"step", *_MOMENTS}
        if not known or not all(_fits(parts[name], weights[number]) for name in _MOMENTS):
            raise CheckpointError(f"{path} {_OTHER}")
        if not _is_count(parts["step"]):
            raise CheckpointError(f"{path}: optimizer.state[{number}].step is no number; {_AGAIN}")
    state = {
        number: {name: parts[name] for name in ("step", *_MOMENTS)} for number, parts in saved.state.items()
    }
    rates = [{**group, "lr": own.lr} for group, own in zip(groups, saved.param_groups, strict=True)]
    return {"state": state, "param_groups": rates}


def _is_count(step: Tensor) -> bool:
    return _whole(step) and step.shape == () and step.is_floating_point() and 0 <= float(step) < 2**53


def _fits(moment: Tensor, weight: Tensor) -> bool:
    return moment.shape == weight.shape and moment.is_floating_point() and _whole(moment)


def _read(path: Path, whole: bool = True) -> _State:
    """A checkpoint with its checksums verified; without `whole` tensors stay on disk, unverified."""
    if not os.path.lexists(path):
        raise CheckpointError(f"no checkpoint at {path}: drop `resume` to start the run")
    state = read_pt(path, _State, CheckpointError, _AGAIN, verify=whole)
    if strange := [key for key, value in state.settings.items() if not _is_plain(value)]:
        raise CheckpointError(f"{path}: settings.{strange[0]} is no plain value; {_AGAIN}")
    return state


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(part) for key, part in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, int):
        return abs(value) < 2**64
    return value is None or isinstance(value, float | str)


def _same_settings(path: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    if saved.get("processes", 1) != now.get("processes", 1):
        before, after = saved.get("processes", 1), now.get("processes", 1)
        saved, now = _by_step(saved), _by_step(now)
        log.info(
            "this run had %d process%s and goes on with %d: on the same batches, not to the same bits",
            before,
            "es" if before > 1 else "",
            after,
        )
    saved, now = _without_epochs({**_OF_THEN, **saved}, {**_OF_THEN, **now})
    changed = [key for key in {**saved, **now} if saved.get(key) != now.get(key)]
    if changed:
        listed = ", ".join(
            f"{one_line(key)} (was {saved.get(key)!r}, now {now.get(key)!r})" for key in sorted(changed)[:4]
        )
        raise CheckpointError(
            f"{path} belongs to a run with other settings: {listed}; use the same settings, or a new `out`"
        )
