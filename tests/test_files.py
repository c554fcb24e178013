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
from clipgraft.files import atomic_path, inside, sweep_partial, write_json, write_text


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
        assert temporary.parent == tmp_path
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


def test_sweeping_removes_partial_folders_and_nothing_else(tmp_path: Path) -> None:
    """A half-saved transformers folder is rubbish too; the user's own hidden files are not."""
    (tmp_path / ".epoch_1.partial" / "x").mkdir(parents=True)
    (tmp_path / ".gitignore").touch()
    (tmp_path / "partial.txt").touch()
    sweep_partial(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".gitignore", "partial.txt"]


def test_names_that_are_no_utf8_are_escaped(tmp_path: Path) -> None:
    """Pictures unpacked from an old archive have such names; a report on them must not crash."""
    name = os.fsdecode(b"\xe9.png")
    write_json(tmp_path / "file.json", {"name": name})
    assert json.loads((tmp_path / "file.json").read_text(encoding="utf-8")) == {"name": name}


def test_files_are_readable_by_others(tmp_path: Path) -> None:
    """Temporary files are private; an adapter on a shared disk must not be."""
    write_text(tmp_path / "file", "text")
    assert (tmp_path / "file").stat().st_mode & 0o444 == 0o444


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
