"""What a run was made with, so that two runs can be told apart by it."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from clipgraft.models.clip import Clip

_CPUINFO = Path("/proc/cpuinfo")


def made_with(clip: Clip) -> dict[str, str]:
    """The machine, and versions of Python and of the packages that compute."""
    library = "open_clip_torch" if clip.family.name == "open_clip" else "transformers"
    packages = ("clipgraft", "torch", library)
    found = {name.removesuffix("_torch"): known for name in packages if (known := _version(name))}
    return {"machine": _machine(clip.device), "python": platform.python_version(), **found}


def _machine(device: torch.device) -> str:
    """The graphics card, or the processor and how many threads torch uses of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'s' * (threads != 1)} of {os.cpu_count()}"


def _processor() -> str:
    """Its name, where the system tells; else the architecture."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
