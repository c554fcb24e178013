"""Which thread computes, and with how many of its own.

torch's OpenMP (libgomp) lends a team of threads to every thread that computes in parallel, and lets all teams
wait asleep once there are more threads than cores. The process's main thread always counts, so that a text
takes half as long again where any other one computes: a process that does nothing else computes in its main
thread, and all other threads prepare and read with one thread each.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import torch

Loop: TypeAlias = Callable[[], None]
Join: TypeAlias = Callable[[], object]
Begin: TypeAlias = Callable[[Loop], Join]
"""Begins a loop in some thread; what it returns waits for the loop's end."""
alone = partial(torch.set_num_threads, 1)
"""Makes the calling thread compute without a team."""


def in_own_thread(loop: Loop) -> Join:
    """Run a loop in a new thread."""
    thread = threading.Thread(target=loop, name="clipgraft-compute", daemon=True)
    thread.start()
    return thread.join


@dataclass(frozen=True)
class Computing:
    """Where a service computes.

    Attributes:
        threads: how many compute together; by default as many as torch takes where this is made.
        begin: what runs the loop that computes.
    """

    threads: int = field(default_factory=torch.get_num_threads)
    begin: Begin = in_own_thread
