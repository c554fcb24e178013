"""Files appear whole or not at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from clipgraft.errors import DataError
from clipgraft.files import atomic_folder, atomic_path, inside, sweep_partial, write_json, write_text


def test_a_file_appears_whole_with_its_folders(tmp_path: Path) -> None:
    """Writing into a new folder is the first thing every run does."""
    target = tmp_path / "a" / "b" / "kết quả.json"
    write_json(target, {"từ": [1, 2]})
    assert json.loads(target.read_text(encoding="utf-8")) == {"từ": [1, 2]}
    assert "từ" in target.read_text(encoding="utf-8"), "readable by people"
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_nothing_is_seen_before_it_is_whole(tmp_path: Path) -> None:
    """A reader would find half a file."""
    target = tmp_path / "file.txt"
    write_text(target, "old")
    with atomic_path(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
        assert temporary.suffix == ".txt"
    assert target.read_text() == "new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_nothing_else(error: type[BaseException], tmp_path: Path) -> None:
    """A failed save would destroy the last good one, or litter the folder."""
    target = tmp_path / "file.txt"
    write_text(target, "old")

    def fail() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_kill_leaves_the_old_file_and_its_leftover_is_swept(tmp_path: Path) -> None:
    """Every kill would leave a checkpoint's worth of rubbish for ever."""
    target = tmp_path / "checkpoints" / "latest.pt"
    write_text(target, "old")
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom clipgraft.files import atomic_path\n"
        "with atomic_path(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(target)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert target.read_text() == "old"
    assert len(list(target.parent.iterdir())) == 2
    sweep_partial(tmp_path)
    assert list(target.parent.iterdir()) == [target]


def test_sweeping_removes_nothing_that_is_not_a_leftover_of_ours(tmp_path: Path) -> None:
    """The user's own hidden files, and what another thread or process is writing now, would be gone."""
    theirs = [".gitignore", "partial.txt", ".photos.0123abcd.partial", ".film.partial"]
    for name in theirs:
        (tmp_path / name).mkdir()
        (tmp_path / name / "kept").touch()
    with atomic_path(tmp_path / "file.txt") as temporary:
        sweep_partial(tmp_path)
        write_text(tmp_path / "file.txt", "another writer of the same file")
        temporary.write_text("new")
    assert (tmp_path / "file.txt").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*theirs, "file.txt"])


_WRITE_FOLDER = """
import os, signal, sys
from pathlib import Path
import clipgraft.files as files
target, when, swaps = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "True"
if not swaps:
    files._exchange = lambda one, other: False
real, seen = Path.rename, []
def rename(self, to):
    real(self, to)
    seen.append(to)
    if when == "between" and len(seen) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
Path.rename = rename
with files.atomic_folder(target) as folder:
    (folder / "weights").write_text("new")
    if when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
files._remove = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("swaps", [True, False])
@pytest.mark.parametrize("when", ["before", "between"])
def test_whenever_a_writer_is_killed_the_old_or_new_folder_is_there(
    when: str, swaps: bool, tmp_path: Path
) -> None:
    """A kill while a model is replaced would take the old one away, or leave a second one for ever."""
    target = tmp_path / "model"
    with atomic_folder(target) as folder:
        (folder / "weights").write_text("old")
    subprocess.run([sys.executable, "-c", _WRITE_FOLDER, str(target), when, str(swaps)], check=False)
    if swaps:
        assert (target / "weights").read_text() in ("old", "new"), "at once where the system can"
    sweep_partial(tmp_path)
    assert (target / "weights").read_text() in ("old", "new")
    with atomic_folder(target) as folder:
        (folder / "weights").write_text("newest")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (target / "weights").read_text() == "newest"


def test_the_next_writer_of_a_target_removes_what_the_last_one_left(tmp_path: Path) -> None:
    """Nobody sweeps beside a model that `merge` writes: each kill would leave hundreds of megabytes."""
    target = tmp_path / "model"
    subprocess.run([sys.executable, "-c", _WRITE_FOLDER, str(target), "before", "True"], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    with atomic_folder(target) as folder:
        (folder / "weights").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_names_as_long_as_the_system_takes_can_be_written(tmp_path: Path) -> None:
    """A hidden name beside it would be too long."""
    write_text(tmp_path / ("x" * 250), "text")
    assert [len(path.name) for path in tmp_path.iterdir()] == [250]


def test_names_that_are_no_utf8_are_escaped(tmp_path: Path) -> None:
    """Pictures unpacked from an old archive have such names; a report on them must not crash."""
    name = os.fsdecode(b"\xe9.png")
    write_json(tmp_path / "file.json", {"name": name})
    assert json.loads((tmp_path / "file.json").read_text(encoding="utf-8")) == {"name": name}


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
def test_files_have_the_permissions_of_the_users_umask(umask: int, tmp_path: Path) -> None:
    """An adapter on a shared disk must be readable, and one in a private folder must not become public."""
    before = os.umask(umask)
    try:
        write_text(tmp_path / "file", "text")
        with atomic_folder(tmp_path / "folder") as folder:
            (folder / "weights").touch(0o600)
    finally:
        os.umask(before)
    for name in ("file", "folder/weights"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.parametrize("name", ["a.npy", "img_emb/img_emb_0.npy", "", ".", "a..b", "..a/x"])
def test_names_inside_a_folder_are_taken(name: str, tmp_path: Path) -> None:
    """A record's own files must be found."""
    assert inside(tmp_path, name) == tmp_path / name


@pytest.mark.parametrize(
    "name",
    [
        "..",
        "../a",
        "a/../../b",
        "/etc/passwd",
        "a/../b",
        "a\x00b",
        "C:\\a",
        "..\\a",
        "out/a",
        "loop/a",
    ],
)
def test_names_that_lead_out_of_a_folder_are_refused(name: str, tmp_path: Path) -> None:
    """A manifest from elsewhere had files of the user's home deleted."""
    folder = tmp_path / "encoded"
    folder.mkdir()
    (folder / "out").symlink_to(tmp_path)
    (folder / "loop").symlink_to("loop")
    with pytest.raises(
        DataError, match=r"m\.json: names .* outside of .*; nothing was touched; encode again"
    ) as e:
        inside(folder, name, "m.json", "encode again")
    assert str(e.value).isprintable()


def test_a_folder_that_is_a_link_itself_is_followed(tmp_path: Path) -> None:
    """Encoded folders are linked to from other disks."""
    (tmp_path / "there").mkdir()
    (tmp_path / "here").symlink_to("there")
    assert inside(tmp_path / "here", "a") == tmp_path / "here" / "a"
