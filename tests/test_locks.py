"""One owner at a time, whose lock dies with it."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from clipgraft.errors import BusyError
from clipgraft.locks import LOCK, require_free, sole_owner

_OWNER = """
import sys, time
from pathlib import Path
from clipgraft.locks import sole_owner
with sole_owner(Path(sys.argv[1]), "it", "wait"):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def another(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds a lock until it is killed."""
    with subprocess.Popen(
        [sys.executable, "-c", _OWNER, str(path)], stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "held\n"
        try:
            yield owner
        finally:
            owner.kill()


def test_another_process_is_refused_and_told_who_is_there(tmp_path: Path) -> None:
    """Two trainings would write into one run, and nobody would know which process to look for."""
    with another(tmp_path / LOCK) as owner:
        told = rf"^run x is in use by process {owner.pid} on .+ since \d{{4}}-.*: choose another$"
        with pytest.raises(BusyError, match=told), sole_owner(tmp_path / LOCK, "run x", "choose another"):
            pass
        with pytest.raises(BusyError, match=told):
            require_free(tmp_path / LOCK, "run x", "choose another")


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    """After a power cut a run could never go on."""
    with another(tmp_path / LOCK) as owner:
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        require_free(tmp_path / LOCK, "it", "wait")
        with sole_owner(tmp_path / LOCK, "it", "wait"):
            pass
    assert list(tmp_path.iterdir()) == [], "and its file goes with the last owner"


def test_two_threads_are_kept_apart_as_well(tmp_path: Path) -> None:
    """System locks are of a process: two fits in one notebook would share a run folder."""
    found: list[BaseException] = []

    def own() -> None:
        try:
            with sole_owner(tmp_path / LOCK, "it", "wait"):
                pass
        except BusyError as error:
            found.append(error)

    with sole_owner(tmp_path / LOCK, "it", "wait"):
        thread = threading.Thread(target=own)
        thread.start()
        thread.join()
    assert len(found) == 1
    own()
    assert len(found) == 1


def test_asking_whether_it_is_free_leaves_nothing(tmp_path: Path) -> None:
    """A command that is refused would leave a file, or a folder, of a run that never was."""
    require_free(tmp_path / "run" / LOCK, "it", "wait")
    assert list(tmp_path.iterdir()) == []
