"""Describe the machine of a benchmark: processor, threads, memory, versions."""

from __future__ import annotations

import datetime
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = (
    "clipgraft",
    "torch",
    "transformers",
    "peft",
    "open_clip_torch",
    "sentence-transformers",
    "clip-benchmark",
    "calflops",
    "pillow",
    "numpy",
)
_MATRIX_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def describe() -> dict[str, Any]:
    """Return plain values for the report."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "cpu": _cpu_line("model name") or platform.processor() or platform.machine(),
        "instructions": [flag for flag in _MATRIX_FLAGS if flag in (_cpu_line("flags") or "").split()],
        "cores": usable_cores(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "load": os.getloadavg()[0],
    }


def usable_cores() -> int:
    return len(os.sched_getaffinity(0))


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _cpu_line(key: str) -> str | None:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None
