"""Running `encode_folder` again: after a kill, and after the source has changed."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import clipgraft as cg
from clipgraft.models.clip import Clip
from clipgraft.search import encode
from clipgraft.search.encode import encode_folder
from clipgraft.search.manifest import read_manifest
from clipgraft.search.store import sole_writer
from encoded_folders import BAD, GOOD, MakeAdapter, read_encoded, read_errors, tree_bytes, write_picture

SMALL = {"batch_size": 4, "shard_rows": 6, "workers": 0, "autocast": False}
PROGRAM = """
import sys, torch
torch.set_num_threads(1)
from clipgraft.models.load import load
from clipgraft.search.encode import encode_folder
print("ready", flush=True)
config, source, out = sys.argv[1:]
encode_folder(load(config, "none"), source, out, batch_size=4, shard_rows=6, workers=0, autocast=False,
    progress=lambda done, total: print(done, flush=True))
"""


def same_vectors(one: Path, other: Path) -> None:
    """The same rows with the same vectors to the last place of fp16, in whichever shards."""
    a, b = read_encoded(one), read_encoded(other)
    assert set(a) == set(b)
    keys = list(a)
    assert np.stack([a[k] for k in keys]) == pytest.approx(np.stack([b[k] for k in keys]), abs=1e-3)
    assert read_errors(one) == read_errors(other)


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def die_at(patch: pytest.MonkeyPatch, step: int) -> None:
    """Die in place of the step-th change of the file system that encoding makes."""
    count = 0

    def counting(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count > step:
                raise Killed
            return real(*args, **kwargs)

        return call

    patch.setattr(Path, "replace", counting(Path.replace))
    patch.setattr(Path, "unlink", counting(Path.unlink))
    patch.setattr("clipgraft.files._sync_file", counting(lambda path: None))


def run_with_kills(clip: Clip, source: Path, out: Path, seed: int) -> int:
    """Encode, dying after a random number of changes each time until it gets through; returns the deaths."""
    dice, deaths = random.Random(seed), 0
    while True:
        with pytest.MonkeyPatch.context() as patch:
            die_at(patch, dice.randrange(3, 40))
            try:
                encode_folder(clip, source, out, **SMALL)
            except Killed:
                deaths += 1
            else:
                return deaths


@pytest.mark.parametrize("seed", range(4))
def test_dying_anywhere_changes_nothing(clip: Clip, pictures: Path, tmp_path: Path, seed: int) -> None:
    """After a kill a rerun would lose a shard, repeat one, or leave other bytes than an undisturbed run."""
    encode_folder(clip, pictures, tmp_path / "whole", **SMALL)
    deaths = run_with_kills(clip, pictures, tmp_path / "killed", seed)
    assert deaths > 0
    assert tree_bytes(tmp_path / "killed") == tree_bytes(tmp_path / "whole")


@pytest.mark.parametrize("seed", range(4))
def test_dying_during_a_difference_changes_nothing(
    clip: Clip, pictures: Path, tmp_path: Path, seed: int
) -> None:
    """A kill while shards are compacted would lose rows or hold them twice."""
    for name in ("whole", "killed"):
        encode_folder(clip, pictures, tmp_path / name, **SMALL)
    change(pictures)
    encode_folder(clip, pictures, tmp_path / "whole", **SMALL)
    deaths = run_with_kills(clip, pictures, tmp_path / "killed", seed)
    assert deaths > 0
    assert tree_bytes(tmp_path / "killed") == tree_bytes(tmp_path / "whole")


def change(pictures: Path) -> None:
    """Delete two, repair one, change one and add three."""
    (pictures / "00.png").unlink()
    (pictures / "b/c/20.png").unlink()
    write_picture(pictures / "a/broken.jpg", 50)
    write_picture(pictures / "a/10.png", 51)
    for number in range(3):
        write_picture(pictures / "neu" / f"{number}.png", 60 + number)


@pytest.mark.slow
def test_sigkill_and_rerun(clip: Clip, pictures: Path, tmp_path: Path, tiny_config: Path) -> None:
    """The same with real processes that are killed for good: nothing of them may hold the folder."""
    encode_folder(clip, pictures, tmp_path / "whole", **SMALL)
    out = tmp_path / "killed"
    words = [sys.executable, "-c", PROGRAM, str(tiny_config), str(pictures), str(out)]
    for stop_at in (1, 9):
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip().isdecimal() and int(line) >= stop_at:
                break
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    killed = read_manifest(out)
    assert killed is not None
    assert killed.rows < GOOD
    subprocess.run(words, check=True, capture_output=True)
    assert tree_bytes(out) == tree_bytes(tmp_path / "whole")


def test_finished_shards_are_never_computed_again(
    clip: Clip, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rerun would cost as much as the first run."""
    encode_folder(clip, pictures, tmp_path / "out", **SMALL)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "img_emb").iterdir()}

    def never(*_: object) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr("clipgraft.engine.encoder.Encoder.encode_image", never)
    result = encode_folder(clip, pictures, tmp_path / "out", **SMALL)
    assert (result.encoded, result.kept, result.removed, result.errors) == (0, GOOD, 0, 2)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "img_emb").iterdir()}


def test_only_the_difference_is_encoded(clip: Clip, pictures: Path, tmp_path: Path) -> None:
    """Adding a photo to a million would encode a million, or leave deleted ones to be found."""
    encode_folder(clip, pictures, tmp_path / "out", **SMALL)
    old = read_encoded(tmp_path / "out")
    change(pictures)
    result = encode_folder(clip, pictures, tmp_path / "out", **SMALL)
    assert (result.encoded, result.removed, result.kept) == (5, 3, GOOD - 3)
    new = read_encoded(tmp_path / "out")
    assert set(new) == set(old) - {"00.png", "b/c/20.png"} | {
        "a/broken.jpg",
        *(f"neu/{i}.png" for i in range(3)),
    }
    for key in set(new) & set(old) - {"a/10.png"}:
        assert np.array_equal(new[key], old[key])
    assert not np.array_equal(new["a/10.png"], old["a/10.png"])
    assert set(read_errors(tmp_path / "out")) == BAD - {"a/broken.jpg"}
    encode_folder(clip, pictures, tmp_path / "fresh", **SMALL)
    same_vectors(tmp_path / "out", tmp_path / "fresh")
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert manifest.rows == len(new)


def test_new_captions_cost_no_encoding(clip: Clip, pictures: Path, tmp_path: Path) -> None:
    """Correcting a caption would leave the old one in the results, or encode the image again."""
    table = pictures / "pairs.csv"
    table.write_text("image,caption\na/01.jpg,old\n00.png,same\n")
    encode_folder(clip, table, tmp_path / "out", **SMALL)
    before = read_encoded(tmp_path / "out")
    table.write_text("image,caption\na/01.jpg,new\n00.png,same\n")
    assert encode_folder(clip, table, tmp_path / "out", **SMALL).encoded == 0
    (file,) = (tmp_path / "out" / "metadata").iterdir()
    assert pq.read_table(file).column("caption").to_pylist() == ["new", "same"]
    after = read_encoded(tmp_path / "out")
    assert all(np.array_equal(before[key], after[key]) for key in before)


def test_a_file_that_comes_back_is_encoded(clip: Clip, pictures: Path, tmp_path: Path) -> None:
    """A row whose image was missing once would stay an error for ever, and a deleted one a result."""
    table = pictures / "pairs.csv"
    table.write_text("image,caption\nlate.png,x\n00.png,y\n")
    assert encode_folder(clip, table, tmp_path / "out", **SMALL).errors == 1
    write_picture(pictures / "late.png", 5)
    (pictures / "00.png").unlink()
    encode_folder(clip, table, tmp_path / "out", **SMALL)
    assert set(read_encoded(tmp_path / "out")) == {"late.png"}
    assert set(read_errors(tmp_path / "out")) == {"00.png"}


def test_retry_errors(clip: Clip, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a network that was down made unreadable could never be read again."""
    with monkeypatch.context() as patch:
        patch.setattr("clipgraft.search.engines._content", lambda part: "the network is down")
        encode_folder(clip, pictures, tmp_path / "out", **SMALL)
    assert encode_folder(clip, pictures, tmp_path / "out", **SMALL).rows == 0
    assert encode_folder(clip, pictures, tmp_path / "out", retry_errors=True, **SMALL).rows == GOOD
    assert set(read_errors(tmp_path / "out")) == BAD


def test_a_lost_or_cut_shard_is_encoded_again(
    clip: Clip, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file that was lost in a copy would leave images that no search finds."""
    out = tmp_path / "out"
    encode_folder(clip, pictures, out, **SMALL)
    (out / "img_emb" / "img_emb_1.npy").unlink()
    with (out / "metadata" / "metadata_2.parquet").open("ab") as file:
        file.truncate(100)
    encode_folder(clip, pictures, out, **SMALL)
    encode_folder(clip, pictures, tmp_path / "fresh", **SMALL)
    same_vectors(out, tmp_path / "fresh")
    assert sum("are encoded again" in line for line in caplog.messages) == 2


def test_another_source_is_refused(clip: Clip, pictures: Path, tmp_path: Path) -> None:
    """A folder that is not mounted, or another one, would take every row away."""
    encode_folder(clip, pictures, tmp_path / "out", **SMALL)
    write_picture(tmp_path / "other" / "x.png", 1)
    with pytest.raises(cg.errors.DataError, match="none of its images is in"):
        encode_folder(clip, tmp_path / "other", tmp_path / "out", **SMALL)
    assert len(read_encoded(tmp_path / "out")) == GOOD


def test_a_source_that_moved_costs_nothing(clip: Clip, pictures: Path, tmp_path: Path) -> None:
    """Mounting the disk elsewhere would encode everything again."""
    encode_folder(clip, pictures, tmp_path / "out", **SMALL)
    pictures.rename(tmp_path / "moved")
    result = encode_folder(clip, tmp_path / "moved", tmp_path / "out", **SMALL)
    assert (result.encoded, result.kept) == (0, GOOD)
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert manifest.root == str(tmp_path / "moved")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dtype": "float32"}, "holds float16, not float32"),
        ({"autocast": True}, "computed in float32, not in float32 in bf16"),
        ({"exact_preprocess": True}, "another preprocessing"),
    ],
)
def test_other_settings_are_refused(
    clip: Clip, pictures: Path, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    """Vectors of two kinds in one folder cannot be compared, and nobody would see it."""
    encode_folder(clip, pictures, tmp_path / "out", **SMALL)
    with pytest.raises(cg.errors.DataError, match=says) as refused:
        encode_folder(clip, pictures, tmp_path / "out", **{**SMALL, **changes})
    assert "\n" not in str(refused.value)


def test_another_base_or_adapter_is_refused(
    clip: Clip, pictures: Path, tmp_path: Path, tiny_openclip: Any, make_adapter: MakeAdapter
) -> None:
    """Half of a folder would be vectors of another model."""
    out = tmp_path / "out"
    encode_folder(clip, pictures, out, **SMALL)
    other = Clip(tiny_openclip, clip.family, clip.tokenizer, clip.preprocess)
    with pytest.raises(
        cg.errors.DataError, match=f"made by base .*{clip.fingerprint}.*not by .*{other.fingerprint}"
    ):
        encode_folder(other, pictures, out, **SMALL)
    cg.load_adapter(clip, make_adapter("eye", "vision.*.*"))
    with pytest.raises(cg.errors.DataError, match="vectors of the base, not of adapter default"):
        encode_folder(clip, pictures, out, **SMALL)


def test_two_writers(clip: Clip, pictures: Path, tmp_path: Path) -> None:
    """Two runs into one folder would take each other's files away."""
    out = tmp_path / "out"
    with sole_writer(out), pytest.raises(cg.errors.BusyError, match=r"is in use by process \d+"):
        encode_folder(clip, pictures, out, **SMALL)
    assert encode_folder(clip, pictures, out, **SMALL).rows == GOOD


def test_two_processes(tmp_path: Path, clip: Clip, pictures: Path) -> None:
    """The same between two terminals; a process that was killed holds nothing."""
    code = f"""
from pathlib import Path
from clipgraft.search.store import sole_writer
with sole_writer(Path({str(tmp_path / "out")!r})):
    print("mine", flush=True)
    input()
"""
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdin is not None
    assert holder.stdout.readline() == "mine\n"
    with pytest.raises(cg.errors.BusyError, match=f"is in use by process {holder.pid}"):
        encode_folder(clip, pictures, tmp_path / "out", **SMALL)
    holder.kill()
    holder.wait()
    holder.stdin.close()
    holder.stdout.close()
    assert encode_folder(clip, pictures, tmp_path / "out", **SMALL).rows == GOOD


def test_kernels_of_the_first_run_stay(clip: Clip, pictures: Path, tmp_path: Path) -> None:
    """Another attention kernel rounds otherwise, so a rerun would not continue to the same bits."""
    encode_folder(clip, pictures, tmp_path / "out", **SMALL)
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert manifest.kernels
    assert encode._attention(manifest).choices == dict(manifest.kernels)
