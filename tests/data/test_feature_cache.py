"""The feature cache: what it gives back, what it computes again, and how it takes damage."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from clipgraft.data import feature_cache, stored_rows
from clipgraft.data.feature_cache import FeatureCache, default_folder
from clipgraft.data.stored_rows import StoredRows, computed_rows
from feature_caches import KEY, ROW_BYTES, Encoder, ask, names, rows_of, shards


def test_the_second_time_nothing_is_computed(
    cache: FeatureCache, files: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Every run would pay for the image tower again, or train on other bits than the first."""
    caplog.set_level(logging.INFO, "clipgraft")
    first, encoded = ask(cache, files)
    assert encoded == names(files)
    assert torch.equal(first, rows_of(files))
    again, encoded = ask(FeatureCache(cache.folder), files)
    assert encoded == []
    assert torch.equal(again, first)
    assert [line for line in caplog.messages if "from the cache" in line] == [
        "image features: 7 images, 0 from the cache, 7 encoded",
        "image features: 7 images, 7 from the cache, 0 encoded",
    ]


def test_order_and_repeats_are_the_callers(cache: FeatureCache, files: list[Path]) -> None:
    """An image would get the features of another."""
    ask(cache, files[2:5])
    wanted = [files[6], files[3], files[0], files[3], files[2]]
    found, encoded = ask(cache, wanted)
    assert torch.equal(found, rows_of(wanted))
    assert encoded == ["6.png", "0.png"]


def test_only_new_and_changed_images_are_encoded(cache: FeatureCache, files: list[Path]) -> None:
    """One more image would cost as much as all of them; an edited image would keep its old features."""
    ask(cache, files[:5])
    files[1].write_text("41")  # another size
    old = files[3].stat()
    files[3].write_text("8")  # the same size, written later
    os.utime(files[3], ns=(old.st_atime_ns, old.st_mtime_ns + 1))
    found, encoded = ask(cache, files)
    assert encoded == ["1.png", "3.png", "5.png", "6.png"]
    assert torch.equal(found, rows_of(files))


def test_a_path_means_the_same_file_however_it_is_written(
    cache: FeatureCache, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Running from another folder would encode everything again."""
    ask(cache, files)
    monkeypatch.chdir(files[0].parent)
    assert ask(cache, [Path("3.png"), Path("../images/./4.png")])[1] == []
    other = files[0].parent.parent / "other"
    shutil.copytree(files[0].parent, other)
    assert ask(cache, [other / "3.png"])[1] == ["3.png"]


@pytest.mark.parametrize(
    "change",
    [
        {"tower": "other"},
        {"preprocessing": "crop"},
        {"stored": "input of vision block 3"},
        {"precision": "bfloat16"},
        {"dtype": "float16"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_features_depend_on_separates_them(
    cache: FeatureCache, files: list[Path], change: dict[str, str]
) -> None:
    """A run would train on features of another base, crop or precision."""
    ask(cache, files)
    other = replace(KEY, **change)
    assert ask(cache, files, other)[1] == names(files)
    assert ask(cache, files, other)[1] == []
    assert ask(cache, files)[1] == []


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garbage(path: Path) -> None:
    path.write_bytes(os.urandom(300))


@pytest.mark.parametrize("suffix", [".npy", ".index"])
@pytest.mark.parametrize("harm", [truncate, flip, empty, garbage, Path.unlink])
def test_damage_is_said_and_mended(
    cache: FeatureCache,
    files: list[Path],
    harm: Callable[[Path], None],
    suffix: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A bad disk or a full one would change what is trained, or end every run until the cache is deleted."""
    ask(cache, files)
    assert len(shards(cache)) == 2
    harm(shards(cache, suffix)[0])
    found, encoded = ask(cache, files)
    assert torch.equal(found, rows_of(files))
    assert encoded == names(files[:4])
    warned = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    if (harm, suffix) == (Path.unlink, ".index"):  # as an interrupted build leaves it: no damage
        assert warned == []
    else:
        (line,) = warned
        assert "a damaged shard was dropped (" in line
        assert "its images are encoded again" in line
    caplog.clear()
    assert ask(cache, files)[1] == []
    assert caplog.records == []


@settings(max_examples=20)
@given(place=st.integers(0, 10_000), bit=st.integers(0, 7), suffix=st.sampled_from([".npy", ".index"]))
def test_no_flipped_bit_goes_unnoticed(
    place: int, bit: int, suffix: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """One wrong bit in a feature can be a feature of 1e38."""
    folder = tmp_path_factory.mktemp("one")
    image = folder / "1.png"
    image.write_text("1")
    cache = FeatureCache(folder / "cache")
    ask(cache, [image])
    (file,) = shards(cache, suffix)
    content = bytearray(file.read_bytes())
    content[place % len(content)] ^= 1 << bit
    file.write_bytes(content)
    assert ask(cache, [image])[1] == ["1.png"]


def test_a_failed_run_keeps_what_it_encoded(cache: FeatureCache, files: list[Path]) -> None:
    """One unreadable image at the end of a million would cost all of them again."""

    class UnreadableError(Exception):
        pass

    def fail(paths: Sequence[Path], add: Callable[[Tensor], None]) -> None:
        add(rows_of(paths[:3]))
        raise UnreadableError

    with pytest.raises(UnreadableError):
        cache.get_or_compute(KEY, files, fail)
    assert ask(cache, files)[1] == names(files[3:])


def test_a_killed_run_keeps_its_finished_shards(
    cache: FeatureCache, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut an hour of encoding would start at its first image."""

    class Killed(BaseException):
        pass

    real = stored_rows.write_shard

    def dying(*args: object) -> object:
        if shards(cache, ".index"):
            write = stored_rows.atomic_path
            with pytest.MonkeyPatch.context() as patch:  # dies between the array and its index
                patch.setattr(
                    stored_rows,
                    "atomic_path",
                    lambda path, *needs: refuse() if path.suffix == ".index" else write(path, *needs),
                )
                return real(*args)  # type: ignore[arg-type]
        return real(*args)  # type: ignore[arg-type]

    def refuse() -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(feature_cache, "write_shard", dying)
        with pytest.raises(Killed):
            ask(cache, files)
    assert len(shards(cache, ".index")) == 1
    found, encoded = ask(cache, files)
    assert encoded == names(files[4:])
    assert torch.equal(found, rows_of(files))


def test_what_killed_writers_left_is_removed_in_time(cache: FeatureCache, files: list[Path]) -> None:
    """Files that nobody counts would fill the disk; a writer at work must not lose its own."""
    ask(cache, files[:1])
    folder = cache.folder / KEY.digest
    old, fresh, staging = folder / "aa.npy", folder / "cc.npy", folder / ".bb.npy.0123abcd.partial"
    (staging / "new").mkdir(parents=True)
    for path in (old, fresh, staging / ".lock", staging / "new" / "bb.npy"):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    ask(cache, files[:1])
    assert [path.exists() for path in (old, fresh, staging)] == [False, True, False]


def test_two_writers_at_once(tmp_path: Path, files: list[Path]) -> None:
    """Two runs that start together would break each other's cache."""
    meet = threading.Barrier(2, timeout=60)  # a writer that fails must not keep the other one waiting
    results: list[tuple[Tensor, list[str]]] = []

    class Meeting(Encoder):
        def __call__(self, paths: Sequence[Path], add: Callable[[Tensor], None]) -> None:
            meet.wait()  # both have looked what is there before either writes
            super().__call__(paths, add)

    def build() -> None:
        encoder = Meeting(after_batch=meet.wait)
        cache = FeatureCache(tmp_path / "cache", shard_bytes=2 * ROW_BYTES)
        results.append(ask(cache, files, KEY, encoder))

    threads = [threading.Thread(target=build) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [encoded for _, encoded in results] == [names(files)] * 2
    assert all(torch.equal(found, rows_of(files)) for found, _ in results)
    found, encoded = ask(FeatureCache(tmp_path / "cache"), files)
    assert encoded == []
    assert torch.equal(found, rows_of(files))


def test_activations_come_row_by_row_from_the_disk(cache: FeatureCache, files: list[Path]) -> None:
    """Activations of a data set are larger than memory: (tokens, width) each, in bfloat16."""
    key = replace(KEY, stored="input of vision block 1", dtype="bfloat16")
    torch.manual_seed(0)
    values = {path.name: torch.randn(3, 5).bfloat16() for path in files}

    def compute(paths: Sequence[Path], add: Callable[[Tensor], None]) -> None:
        for path in paths:
            add(values[path.name][None])

    for _ in range(2):
        rows = cache.get_or_compute(key, files, compute)
        assert (rows.shape, rows.dtype, len(rows)) == ((7, 3, 5), torch.bfloat16, 7)
        ids = torch.tensor([6, 0, 3, 3, 1])
        assert torch.equal(rows[ids], torch.stack([values[f"{number}.png"] for number in ids.tolist()]))
        compute = Encoder()
    assert rows[torch.tensor([], dtype=torch.long)].shape == (0, 3, 5)


def test_features_may_be_written_to_by_their_owner(cache: FeatureCache, files: list[Path]) -> None:
    """An in-place operation on features would change the cache for every later run, or crash."""
    first, _ = ask(FeatureCache(cache.folder), files)
    first.zero_()
    assert torch.equal(ask(cache, files)[0], rows_of(files))


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4)), min_size=1), st.data())
def test_rows_are_found_wherever_they_lie(places: list[tuple[int, int]], data: st.DataObject) -> None:
    """Any mix of shards and orders must give each item its own row."""
    import numpy as np

    parts = [np.arange(100 * part, 100 * part + 10).reshape(5, 2) for part in range(3)]
    part, row = np.array(places, np.int64).T
    rows = StoredRows(parts, part, row, torch.int64)
    naive = torch.stack([torch.from_numpy(parts[p][r]) for p, r in places])
    assert torch.equal(rows.tensor(), naive)
    ids = data.draw(st.lists(st.integers(0, len(places) - 1)))
    assert torch.equal(rows[torch.tensor(ids, dtype=torch.long)], naive[ids])


def test_without_a_cache_the_rows_are_the_same(files: list[Path]) -> None:
    """`--feature-cache none` is a way to save disk, not another result."""
    rows = computed_rows(files, Encoder(batch=3), torch.float32)
    assert torch.equal(rows.tensor(), rows_of(files))
    assert not rows.tensor().is_inference()


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The documented folders, in the documented order."""
    monkeypatch.setenv("CLIPGRAFT_CACHE", str(tmp_path))
    assert default_folder() == tmp_path / "features"
    monkeypatch.delenv("CLIPGRAFT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_folder() == tmp_path / "xdg" / "clipgraft" / "features"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_folder() == tmp_path / "home" / ".cache" / "clipgraft" / "features"
