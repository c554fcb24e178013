"""Files of weights as they lie around: opened without running any code of theirs, to one flat dictionary.

Known are safetensors, `torch.save` files of plain values, and TorchScript archives, OpenAI's own among them,
whose tensors are read past their code. Training loops wrap weights in entries (`state_dict`,
`model_state_dict`) beside optimisers and averages; the model's own weights are taken and the rest is said.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from clipgraft.models.library_calls import log_reading
from clipgraft.models.torchscript import is_torchscript, read_torchscript
from clipgraft.readers import placeholder
from clipgraft.records import load_pt

# Where training loops keep the weights, the most telling first.
_ENTRIES = ("state_dict", "model_state_dict", "model", "module", "net", "clip", "weights", "params")
# Where they keep an average of them over steps.
_AVERAGES = ("state_dict_ema", "ema_state_dict", "model_ema", "ema_model", "params_ema", "ema")


@dataclass(frozen=True)
class WeightsFile:
    """Weights by name.

    Attributes:
        path: the file.
        state: name to tensor, on the CPU.
        notes: what was chosen or left out, for the user.
        torchscript: whether it is an archive of a compiled model, as OpenAI's downloads are.
    """

    path: Path
    state: dict[str, Tensor]
    notes: tuple[str, ...] = ()
    torchscript: bool = field(default=False)


class UnreadableError(ValueError):
    """A file of weights that cannot be opened; the message says why and what to do."""


def read_weights(path: Path) -> WeightsFile:
    """Read a file of weights.

    Raises:
        UnreadableError: it is damaged, no file of weights, or needs code to be run.
    """
    check_is_weights(path)
    log_reading(path, path.stat().st_size)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return WeightsFile(path, load_file(path))
        if is_torchscript(path):
            return _read_archive(path)
        state, notes = _model_entry(load_pt(path))
    except UnreadableError:
        raise
    except Exception as error:  # the unpickler raises whatever the bytes make it raise
        raise UnreadableError(reason(error)) from error
    return WeightsFile(path, state, notes)


def _read_archive(path: Path) -> WeightsFile:
    try:
        return WeightsFile(path, read_torchscript(path), torchscript=True)
    except Exception as error:
        why = " ".join(str(error).split())[:120] or type(error).__name__
        raise UnreadableError(
            f"it is a TorchScript archive whose weights cannot be found ({why}); fetch it again, or save the "
            "state_dict() of the model that it was compiled from"
        ) from error


def check_is_weights(path: Path) -> None:
    """Refuse what download tools leave in place of a file; raises UnreadableError that names it."""
    if problem := placeholder(path):
        raise UnreadableError(problem)


def reason(error: Exception) -> str:
    """Why a file of weights cannot be opened, and what to do."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}; check its permissions and disk"
    if "compressed archive" in text:
        return f"{text}; fetch it again"
    pickled = (
        "weights_only",
        "Weights only",
        "Unsupported global",
        "Unsupported class",
        "Unsupported operand",
    )
    if any(sign in text for sign in pickled):
        return (
            "it is damaged, no checkpoint of weights, or holds pickled code, which is never run; save its "
            "state_dict() alone"
        )
    return (
        "it is damaged, no checkpoint of weights, or holds pickled code, which is never run; copy or fetch "
        "it again"
    )


def _model_entry(data: Any) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The weights of the model itself in what a training loop saved."""
    notes: list[str] = []
    for _ in range(4):  # entries in entries; deeper ones are nobody's habit
        if not isinstance(data, Mapping) or not data or not all(isinstance(key, str) for key in data):
            break
        tensors = {name: value for name, value in data.items() if isinstance(value, Tensor)}
        inner = {name: value for name, value in data.items() if isinstance(value, Mapping) and value}
        chosen = next((name for name in (*_ENTRIES, *_AVERAGES) if name in inner), None)
        if len(tensors) > 8 or chosen is None:
            if not tensors:
                break
            if others := [name for name, value in data.items() if not isinstance(value, Tensor)]:
                notes.append(f"left out {len(others)} entries that are no weights: {_some(others)}")
            return tensors, tuple(notes)
        averages = [name for name in _AVERAGES if name in inner and name != chosen]
        if averages:
            notes.append(f"took {chosen!r}; the average beside it, {averages[0]!r}, is left out")
        elif chosen in _AVERAGES:
            notes.append(f"took {chosen!r}, the average over steps: it holds no other weights")
        data = inner[chosen]
    keys = f" under {_some([str(key) for key in data])}" if isinstance(data, Mapping) and data else ""
    raise UnreadableError(
        f"it is damaged or no checkpoint of weights: it holds no named weights{keys}; save the model's "
        "state_dict() to a file"
    )


def _some(names: list[str], most: int = 4) -> str:
    shown = ", ".join(repr(name[:60]) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
