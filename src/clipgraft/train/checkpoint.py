"""Training checkpoints: all that a run needs to go on to the same bits, in one file that is always whole."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipgraft.errors import CheckpointError
from clipgraft.files import atomic_path

LATEST = "latest.pt"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Position:
    """Where a run stands: finished epochs, finished steps of the running epoch, and steps in all."""

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
    """Write trainable weights, optimizer, position and random states; an older file is replaced whole."""
    state = {
        "format": FORMAT_VERSION,
        "position": vars(position),
        "settings": dict(settings),
        "weights": {name: p.detach().cpu() for name, p in _trainable(model)},
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "cuda_random": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    try:
        with atomic_path(path) as temporary:
            torch.save(state, temporary)
    except OSError as error:
        raise CheckpointError(f"cannot write checkpoint {path}: {error.strerror or error}") from error


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, settings: Mapping[str, Any]
) -> Position:
    """Put a run back where its checkpoint was written.

    Raises:
        CheckpointError: no such file, not readable, of another model, or made with other settings.
    """
    state = _read(path)
    _same_settings(path, state["settings"], settings)
    weights = dict(_trainable(model))
    saved: dict[str, Tensor] = state["weights"]
    if set(weights) != set(saved) or any(weights[name].shape != saved[name].shape for name in saved):
        raise CheckpointError(
            f"{path} holds other trainable weights than this model has: resume with its model"
        )
    with torch.no_grad():
        for name, parameter in weights.items():
            parameter.copy_(saved[name])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"])
    if torch.cuda.is_available() and state["cuda_random"]:
        torch.cuda.set_rng_state_all(state["cuda_random"])
    return Position(**state["position"])


def _trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _read(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"no checkpoint at {path}: drop --resume to start the run") from error
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} is damaged or no clipgraft checkpoint: start the run again under another --name"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT_VERSION:
        raise CheckpointError(f"{path} is no checkpoint of this version of clipgraft: start the run again")
    return state


def _same_settings(path: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = [key for key in {**saved, **now} if saved.get(key) != now.get(key)]
    if changed:
        listed = ", ".join(
            f"{key} (was {saved.get(key)!r}, now {now.get(key)!r})" for key in sorted(changed)[:4]
        )
        raise CheckpointError(
            f"{path} belongs to a run with other settings: {listed}; use the same settings, or a new --name"
        )
