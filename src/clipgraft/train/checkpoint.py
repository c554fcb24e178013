"""Training checkpoints: all that a run needs to go on to the same bits, in one file that is always whole."""

from __future__ import annotations

import logging
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipgraft.errors import CheckpointError
from clipgraft.files import atomic_path
from clipgraft.writing import size_of

log = logging.getLogger("clipgraft")
LATEST = "latest.pt"
FORMAT_VERSION = 1
EPOCHS, PARTS = "epochs", "epoch_parts"
_SHARING = ("batch_size", "accum_freq", "processes")
_KEYS = {"format", "position", "settings", "weights", "buffers", "optimizer", "random", "cuda_random"}


@dataclass(frozen=True)
class Position:
    """Where a run stands: finished epochs, finished steps of the running epoch, and steps in all.

    An epoch is finished when it has been evaluated, not with its last step.
    """

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0


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
        "cuda_random": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
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
    _same_settings(path, state["settings"], settings)
    try:
        _copy(state["weights"], _trainable(model))
        _copy(state["buffers"], _buffers(model))
        optimizer.load_state_dict(state["optimizer"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} holds other trainable weights than this model has: resume with the run's own model"
        ) from error
    torch.set_rng_state(state["random"])
    if torch.cuda.is_available() and state["cuda_random"]:
        torch.cuda.set_rng_state_all(state["cuda_random"][: torch.cuda.device_count()])
    return Position(**state["position"])


def recorded_settings(path: Path) -> dict[str, Any]:
    """The settings of the run that wrote a checkpoint; its weights are not read. Raises CheckpointError."""
    return dict(_read(path, whole=False)["settings"])


def recorded_position(path: Path) -> Position:
    """Where the run stood that wrote a checkpoint; its weights are not read. Raises CheckpointError.

    `epoch` counts one whose steps are all done, though it may not have been evaluated, but for the first.
    """
    state = _read(path, whole=False)
    position = Position(**state["position"])
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
    step = math.prod(settings[key] for key in _SHARING if key in settings)
    return {**kept, "pairs in a step": step}


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """What changes without a gradient: the running statistics of batch norms."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in parameters}


def _copy(saved: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    if {name: t.shape for name, t in saved.items()} != {name: t.shape for name, t in into.items()}:
        raise ValueError("names or shapes differ")
    with torch.no_grad():
        for name, tensor in into.items():
            tensor.copy_(saved[name])


def _read(path: Path, whole: bool = True) -> dict[str, Any]:
    """A checkpoint with its checksums verified; without `whole` tensors stay on disk, unverified."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch itself does not look at the checksums
            if whole and (part := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"wrong checksum of {part}")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=not whole)
    except FileNotFoundError as error:
        raise CheckpointError(f"no checkpoint at {path}: drop --resume to start the run") from error
    except PermissionError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    # On damaged bytes zipfile and the unpickler raise almost any type; the reason is kept as the cause.
    except Exception as error:
        raise CheckpointError(
            f"{path} is damaged or no clipgraft checkpoint: start the run again under another --name"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT_VERSION or state.keys() != _KEYS:
        raise CheckpointError(f"{path} is no checkpoint of this version of clipgraft: start the run again")
    return state


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
    saved, now = _without_epochs(saved, now)
    changed = [key for key in {**saved, **now} if saved.get(key) != now.get(key)]
    if changed:
        listed = ", ".join(
            f"{key} (was {saved.get(key)!r}, now {now.get(key)!r})" for key in sorted(changed)[:4]
        )
        raise CheckpointError(
            f"{path} belongs to a run with other settings: {listed}; use the same settings, or a new --name"
        )
