"""A command in several processes: torchrun starts them all alike, and one of them speaks."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clipgraft.train.launch import several

if TYPE_CHECKING:
    from clipgraft.train.distributed import World

log = logging.getLogger("clipgraft")
Command = Callable[[Sequence[str], "World | None"], None]


def run_together(command: Command, argv: Sequence[str]) -> None:
    """Run a command with the other processes that torchrun started; without torchrun, with None for them.

    Only rank 0 writes to the terminal, but for the one process whose error ends the run.
    """
    if not several():
        command(argv, None)
        return
    from clipgraft.train.launch import joined

    with joined(_exit) as world, contextlib.nullcontext() if world.is_rank0 else _silence():
        command(argv, world)


def _exit(code: int, told: str | None) -> None:
    """End the process of a command, whatever it is doing: in a collective on a GPU it hears nothing else."""
    if told is not None:
        os.write(2, f"clipgraft: {told}\n".encode())
    os._exit(code)


def launcher(environment: Mapping[str, str] = os.environ) -> str:
    """What this process was started with, in front of a verb: `clipgraft`, or torchrun and its flags."""
    if not several(environment):
        return "clipgraft"
    size, here = environment["WORLD_SIZE"], environment.get("LOCAL_WORLD_SIZE")
    flags = f"--nproc-per-node {shlex.quote(size)}" if here in (size, None) else "[its flags as before]"
    # Without `--` torchrun takes --logs for the beginning of a flag of its own.
    return f"torchrun {flags} -m -- clipgraft"


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Nothing that Python prints or logs here reaches the terminal."""
    log.addFilter(_drop)
    try:
        with contextlib.ExitStack() as stack:
            nowhere = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
            yield
    finally:
        log.removeFilter(_drop)


def _drop(_: logging.LogRecord) -> bool:
    return False
