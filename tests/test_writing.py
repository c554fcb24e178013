"""A full disk, a quota or a missing permission is one line, whichever library was writing."""

from __future__ import annotations

import errno
import os
import pickle
import resource
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from clipgraft.errors import ClipgraftError, ConfigError, WriteError
from clipgraft.files import atomic_folder, atomic_path, write_text
from clipgraft.writing import size_of, writing

_MOST = 100_000
_VALUES = torch.arange(200_000, dtype=torch.float32)


@contextmanager
def no_file_longer_than(size: int) -> Iterator[None]:
    """As on a disk with that much room, for any user on any system."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def _table(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"x": np.random.default_rng(0).random(100_000)}), path)


def _faiss(path: Path) -> None:
    import faiss

    index = faiss.IndexFlatIP(100)
    index.add(np.zeros((2000, 100), np.float32))  # type: ignore[call-arg]
    faiss.write_index(index, str(path))


def _sqlite(path: Path) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("CREATE TABLE t(x BLOB)")
        db.executemany("INSERT INTO t VALUES (?)", ((b"x" * 1000,) for _ in range(1000)))


def _numpy(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, _VALUES.numpy())


def _picture(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (300, 300, 3), np.uint8)
    Image.fromarray(noise).save(path, format="PNG")


WRITERS: dict[str, Callable[[Path], object]] = {
    "plain": lambda path: path.write_bytes(b"x" * 200_000),
    "torch": lambda path: torch.save({"x": _VALUES}, path),
    "safetensors": lambda path: save_file({"x": _VALUES}, path),
    "numpy": _numpy,
    "picture": _picture,
    "pyarrow": _table,
    "faiss": _faiss,
    "sqlite": _sqlite,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_library_that_runs_out_of_room_is_one_line(name: str, tmp_path: Path) -> None:
    """A SafetensorError, sqlite3.OperationalError or "unexpected pos 64 vs 0" tells nobody what to do."""
    target = tmp_path / "file.bin"
    write_text(target, "old")
    with (
        no_file_longer_than(_MOST),
        pytest.raises(WriteError, match=r"cannot write .*file\.bin: .*; .*again") as caught,
        atomic_path(target, 800_000) as temporary,
    ):
        WRITERS[name](temporary)
    assert "800.0 KB" in str(caught.value), "the room that it needs"
    assert "\n" not in str(caught.value)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
    with atomic_path(target) as temporary:
        WRITERS[name](temporary)
    assert target.stat().st_size > _MOST, "a rerun with room goes through"


_FULL = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from clipgraft.errors import WriteError
from clipgraft.files import atomic_folder, atomic_path
root, size = Path(sys.argv[1]), 8_000_000
for suffix, write in ((".pt", torch.save), (".safetensors", save_file)):
    try:
        with atomic_path(root / f"model{suffix}", size) as temporary:
            write({"x": torch.zeros(2_000_000)}, temporary)
    except WriteError as error:
        print(error)
try:
    with atomic_folder(root / "model", size) as folder:
        save_file({"x": torch.zeros(2_000_000)}, folder / "weights.safetensors")
except WriteError as error:
    print(error)
print(sorted(path.name for path in root.iterdir()))
"""


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_full_disk_names_the_file_the_room_needed_and_the_room_there_is(tmp_path: Path) -> None:
    """Somebody who waited an hour must learn from one line how much to delete, and where."""
    inner = f'mount -t tmpfs -o size=1m none "{tmp_path}" && exec "{sys.executable}" -c "$0" "{tmp_path}"'
    command = ["unshare", "--mount", "sh", "-c", inner, _FULL]  # the disk goes with the process
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    *lines, left = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr
    for line, name in zip(lines, ("model.pt", "model.safetensors", "model"), strict=True):
        assert line.startswith(
            f"cannot write {tmp_path / name}: no space left on the disk: it needs 8.0 MB, and"
        )
        assert "there is room for 1.0" in line
        assert line.endswith(f"; make room in {tmp_path} or choose another place, then run it again")
    assert left == "[]", "nothing half written"


def test_files_within_a_folder_are_named_where_they_would_be(tmp_path: Path) -> None:
    """The message would name a hidden folder that is gone again, and nothing the user knows."""
    with (
        no_file_longer_than(_MOST),
        pytest.raises(WriteError, match=rf"cannot write {tmp_path}/model/weights\.pt: ") as caught,
        atomic_folder(tmp_path / "model") as folder,
        atomic_path(folder / "weights.pt") as temporary,
    ):
        torch.save({"x": _VALUES}, temporary)
    assert "partial" not in str(caught.value)


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_each_reason_is_said(number: int, tmp_path: Path) -> None:
    """A quota is not helped by making room for others, nor a read-only disk by deleting files."""
    target = tmp_path / "file"

    def write() -> None:
        with atomic_path(target) as temporary:
            raise OSError(number, os.strerror(number), str(temporary))

    with pytest.raises(WriteError, match="cannot write") as caught:
        write()
    words = {
        errno.EDQUOT: "quota",
        errno.ENOSPC: "no space",
        errno.EROFS: "Read-only",
        errno.EACCES: "denied",
    }
    assert words[number] in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_file_where_a_folder_should_be_is_said(tmp_path: Path) -> None:
    """`--out notes.txt/model` would end with a traceback."""
    write_text(tmp_path / "notes.txt", "text")
    with pytest.raises(WriteError, match=r"model: "), atomic_folder(tmp_path / "notes.txt" / "model"):
        pass


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("--lr: no space left on device"),
        FileNotFoundError(errno.ENOENT, "No such file", "/elsewhere/base.bin"),
        PermissionError(errno.EACCES, "Permission denied", "/elsewhere/deep/base.bin"),
        ConnectionResetError(errno.ECONNRESET, "reset"),
        RuntimeError("shapes differ"),
        KeyError("x"),
    ],
)
def test_other_faults_pass_as_they_are(error: Exception, tmp_path: Path) -> None:
    """A base that cannot be read, or a bug, would be reported as a disk that is full."""
    with pytest.raises(type(error)) as caught, atomic_path(tmp_path / "deep" / "file"):
        raise error
    assert caught.value is error


def test_a_reason_further_back_is_found(tmp_path: Path) -> None:
    """Libraries wrap the system's error in one of their own."""

    def write() -> None:
        with writing(tmp_path / "file"):
            try:
                raise OSError(errno.ENOSPC, "No space left on device")
            except OSError as error:
                raise ValueError("cannot save") from error

    with pytest.raises(WriteError, match="no space left"):
        write()


def test_sizes_are_of_all_tensors_within() -> None:
    """The room needed for an optimizer's state would be given as nothing."""
    state = {"a": torch.zeros(10), "b": [np.zeros(5), ({"c": torch.zeros(2, dtype=torch.bfloat16)},)], "d": 3}
    assert size_of(state) == 40 + 40 + 4


def test_the_error_crosses_processes() -> None:
    """A sweep's cell, or a loader's process, would fail with a TypeError instead."""
    error = WriteError("cannot write x", "make room")
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, ClipgraftError)
    assert str(again) == str(error) == "cannot write x; make room"
