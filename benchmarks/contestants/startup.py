"""Time and memory of one command in a new interpreter."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from typing import Any


def run(arguments: list[str], times: int) -> dict[str, Any]:
    """Run the command several times after one that fills the caches; returns seconds of each."""
    command = [sys.executable, *arguments]
    seconds = []
    for _ in range(1 + times):
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds.append(time.perf_counter() - started)
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {"seconds": seconds[1:], "command_peak_bytes": largest}
