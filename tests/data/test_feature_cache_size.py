"""The feature cache on a disk that is not its own: bounds, eviction, and folders that cannot be written."""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from clipgraft.data import feature_cache, stored_rows
from clipgraft.data.feature_cache import ENTRY, FeatureCache
from feature_caches import KEY, ROW_BYTES, Encoder, ask, names, rows_of, shards


def entry_bytes(cache: FeatureCache) -> int:
    return sum(path.stat().st_size for path in cache.folder.rglob("*") if path.suffix in (".npy", ".index"))


def bounded(cache: FeatureCache, size: int) -> FeatureCache:
    return FeatureCache(cache.folder, max_bytes=size, shard_bytes=4 * ROW_BYTES)


def test_the_least_recently_used_makes_room(cache: FeatureCache, files: list[Path]) -> None:
    """The disk would fill up, or what is used every day would go first."""
    keys = [replace(KEY, tower=name) for name in "abc"]
    for key in keys[:2]:
        ask(cache, files[:4], key)
    size = entry_bytes(cache)
    for number, key in enumerate((keys[1], keys[0])):  # b was used long before a
        os.utime(shards(cache, ".index", key)[0], (number, number))
    small = bounded(cache, size + 200)  # two entries fit, three do not
    ask(small, files[:4], keys[2])
    assert entry_bytes(cache) <= size + 200
    assert not (cache.folder / keys[1].digest).exists()
    assert ask(small, files[:4], keys[0])[1] == []
    assert ask(small, files[:4], keys[1])[1] == names(files[:4])
    assert not (cache.folder / keys[2].digest).exists(), "a was used after c"


def test_rows_of_the_same_base_make_room_too(cache: FeatureCache, files: list[Path]) -> None:
    """A folder that is watched for months would keep every old version of an image, and refuse new ones."""
    ask(cache, files[:4])
    size = entry_bytes(cache)
    for path in files[:4]:
        path.write_text("9" + path.read_text())
    found, _ = ask(bounded(cache, size + 50), files[:4])
    assert torch.equal(found, rows_of(files[:4]))
    assert entry_bytes(cache) <= size + 50


def test_what_does_not_fit_is_kept_in_memory(
    cache: FeatureCache, files: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    """A cache that is too small would end the run, or throw out all others for nothing."""
    other = replace(KEY, tower="other")
    ask(cache, files[:1], other)
    small = bounded(cache, 7 * ROW_BYTES)
    assert small.shortage(KEY, files, ROW_BYTES) is not None
    found, _ = ask(small, files)
    assert torch.equal(found, rows_of(files))
    assert not (cache.folder / KEY.digest).exists()
    assert ask(cache, files[:1], other)[1] == []
    (line,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert line.startswith(
        "image features: features are kept in memory only: 0.0 MB of features would not fit"
    )
    assert "raise `cache_gb`" in line
    assert cache.shortage(KEY, files, ROW_BYTES) is None


def test_a_full_disk_is_seen_before_anything_is_computed(
    cache: FeatureCache, files: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The disk of everybody else's work would be filled to its last byte."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    encoder = Encoder()
    warned_before: list[int] = []
    encoder.after_batch = lambda: warned_before.append(len(caplog.records))
    found = cache.get_or_compute(KEY, files, encoder, item_shape=(4,)).tensor()
    assert torch.equal(found, rows_of(files))
    assert not cache.folder.exists()
    assert warned_before[0] == 1
    assert "make room, or give `feature_cache` a folder on another disk" in caplog.messages[0]


def test_a_disk_that_fills_up_on_the_way_is_no_failure(
    cache: FeatureCache, files: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Another program may take the room; an hour of encoding must not be lost to that."""
    real = stored_rows.write_shard

    def full(*args: object) -> object:
        if shards(cache):
            raise OSError(28, "No space left on device")
        return real(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(feature_cache, "write_shard", full)
        found, _ = ask(cache, files)
    assert torch.equal(found, rows_of(files))
    (line,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert "no space left on the disk" in line
    assert ask(cache, files)[1] == names(files[4:])


def test_a_folder_that_cannot_be_written_is_no_failure(
    tmp_path: Path, files: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Jobs with a read-only home folder could not train."""
    (tmp_path / "cache").write_text("a file stands here")
    found, _ = ask(FeatureCache(tmp_path / "cache" / "features"), files)
    assert torch.equal(found, rows_of(files))
    (line,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert "give `feature_cache` another folder, or 'none'" in line


def test_foreign_files_are_left_alone(cache: FeatureCache, files: list[Path]) -> None:
    """`--feature-cache ~/data` must not delete arrays that lie in ~/data."""
    mine = cache.folder / ("a" * 32) / "mine.npy"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"precious")
    os.utime(mine, (0, 0))
    ask(cache, files)
    ask(bounded(cache, 10), files[:1], replace(KEY, tower="other"))
    assert mine.read_bytes() == b"precious"
    assert not (mine.parent / ENTRY).exists()
