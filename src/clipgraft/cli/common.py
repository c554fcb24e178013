"""What several commands share: loading a model, choosing a device, options of training."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from clipgraft.adapters.open import load
from clipgraft.cli.flags.shared import ModelFlags
from clipgraft.errors import ConfigError, ModelError
from clipgraft.models.clip import Clip
from clipgraft.report.results import RESULTS, write_results
from clipgraft.train.distributed import World

log = logging.getLogger("clipgraft")


def load_model(spec: ModelFlags) -> Clip:
    """Load the base of a command onto its device, and log one line on it."""
    precision = "bf16" if spec.precision == "bf16" else "fp32"
    clip = load(spec.model, spec.pretrained, device=pick_device(spec.device), precision=precision)
    log.info("base %s on %s, fingerprint %s", _title(clip), clip.device, clip.fingerprint)
    return clip


def load_own_model(spec: ModelFlags, world: World) -> Clip:
    """Load the base of a command in one of several processes, each of which has its own GPU."""
    return load_model(spec.model_copy(update={"device": own_device(spec.device, world)}))


def own_device(name: str, world: World) -> str:
    """Name the device of a process; of several, each has the GPU with its local rank for `auto` and `cuda`.

    Raises:
        ConfigError: one GPU is named for all processes, or there are more processes than GPUs.
    """
    gpus = torch.cuda.device_count()
    if world.alone or name == "cpu" or (name == "auto" and not gpus):
        return name
    if name not in ("auto", "cuda"):
        raise ConfigError(f"--device {name}: every process has a GPU of its own; use --device auto, or cpu")
    if world.local_rank >= gpus:
        raise ConfigError(
            f"--nproc-per-node {world.local_rank + 1} or more, but torch sees {gpus} GPU{'s' * (gpus != 1)} "
            "here: start one process for each, or use --device cpu"
        )
    torch.cuda.set_device(world.local_rank)
    return f"cuda:{world.local_rank}"


def name_after(path: Path, taken: Collection[str]) -> str:
    """Choose a name for an adapter after its folder, different from those taken."""
    parts = [part for part in (path.parent.name, path.stem) if part not in ("", "adapter")]
    stem = re.sub(r"[^A-Za-z0-9_+-]", "-", parts[-1] if parts else "adapter").lstrip("_+-") or "adapter"
    return next(n for i in range(len(taken) + 1) if (n := f"{stem}-{i + 1}" if i else stem) not in taken)


def _title(clip: Clip) -> str:
    return " / ".join(part for part in (clip.source.name, clip.source.pretrained) if part)


def pick_device(name: str) -> torch.device:
    """Turn a device flag into a device; `auto` is the first GPU if there is one.

    Raises:
        ConfigError: the device does not exist here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if re.fullmatch(r"cpu|cuda(:\d+)?", name) is None:
        raise ConfigError(f"--device: got {name!r}, allowed is auto, cpu, cuda or cuda:N")
    device, gpus = torch.device(name), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= gpus:
        seen = f"GPUs 0 to {gpus - 1}" if gpus else "no GPU"
        raise ConfigError(f"--device {name}: torch sees {seen} here; use --device auto")
    return device


def hand_over(
    clip: Clip, run: Path, metrics: Mapping[str, float] | None, base: Mapping[str, float] | None = None
) -> None:
    """Write `results/` of a run: result.json, summary.txt and structure.txt.

    A model that cannot be profiled costs a warning, not the run.
    """
    numbers = {name: value for name, value in (metrics or {}).items() if name != "epoch"}
    try:
        write_results(clip, run / RESULTS, numbers or None, base)
    except ModelError as error:
        log.warning("%s is left out: %s", run / RESULTS, error)
