"""Run one contestant in its own process: `python -m benchmarks.child FUNCTION OPTIONS RESULT`."""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes() -> int:
    """Return the largest resident memory of this process so far (VmHWM), without loader workers."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no VmHWM line; benchmarks need Linux")


def reset_peak() -> None:
    """Reset the peak: loading a model may take more memory than training it, and is the same for all."""
    global _before
    _before = max(_before, peak_bytes())
    _CLEAR.write_text("5")


_before = 0


def main(function: str, options: str, result: str) -> None:
    module, _, name = function.partition(":")
    started = time.perf_counter()
    values: dict[str, Any] = getattr(importlib.import_module(module), name)(**json.loads(options))
    values |= {
        "process_seconds": time.perf_counter() - started,
        "peak_bytes": peak_bytes(),
        "peak_with_loading_bytes": max(_before, peak_bytes()),
    }
    Path(result).write_text(json.dumps(values), encoding="utf-8")


if __name__ == "__main__":
    # The contestants import this module by its name: one copy must hold the peak.
    importlib.import_module("benchmarks.child").main(*sys.argv[1:])
