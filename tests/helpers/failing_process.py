"""Run `clipgraft` so that one rank fails at a step: failing_process.py HOW RANK STEP COMMAND…"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from clipgraft.cli import main
from clipgraft.errors import DataError
from clipgraft.train.loop import Loop

HOW, RANK, STEP = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
_step = Loop.step


def failing(self: Loop, batch: Any, number: int) -> Any:
    if (self.world.rank, number) == (RANK, STEP):
        if HOW == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif HOW == "error":
            raise DataError("3.png is broken: remove it")
        elif HOW == "stop":
            os.kill(os.getppid(), signal.SIGINT)
    return _step(self, batch, number)


if HOW == "settings" and os.environ["RANK"] == str(RANK):
    sys.argv += ["--lr", "3e-5", "--workers", "1"]
Loop.step = failing  # type: ignore[method-assign]
sys.exit(main(sys.argv[4:]))
