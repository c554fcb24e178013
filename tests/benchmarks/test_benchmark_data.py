"""The photographs and captions that benchmarks train on."""

from __future__ import annotations

import io
import statistics
from pathlib import Path

import pytest
from benchmarks.data import (
    LONGEST,
    SHORTEST,
    about_data,
    caption_lengths,
    clip_token_counter,
    make_captions,
    make_data,
    photo,
    read_table,
)
from PIL import Image

from clipgraft.emoji.scenes import EmojiScenes


def test_photos_are_the_same_every_time_and_as_large_as_camera_files() -> None:
    """Two machines would train on different images, or on files that cost less to decode than photographs."""
    scenes = EmojiScenes("train", 3, 0)
    first, again, other = photo(scenes, 1, 0), photo(scenes, 1, 0), photo(scenes, 1, 7)
    assert first.size == (500, 375)
    assert first.tobytes() == again.tobytes() != other.tobytes()
    file = io.BytesIO()
    first.save(file, "JPEG", quality=85)
    assert 25_000 < file.tell() < 70_000


@pytest.mark.parametrize(("variant", "median"), [("natural", 16), ("uniform", 26)])
def test_caption_lengths_have_the_promised_distribution(variant: str, median: int) -> None:
    """The table would speak of captions that the contestants did not see."""
    lengths = caption_lengths(variant, 2048, 0)
    assert lengths == caption_lengths(variant, 2048, 0)
    assert (min(lengths), max(lengths)) == (SHORTEST, LONGEST)
    assert abs(statistics.median(lengths) - median) <= 1
    assert lengths != sorted(lengths)


def test_captions_have_the_wanted_tokens_and_none_comes_twice() -> None:
    """Two equal captions in a batch are false negatives, which ours leaves out and the peers do not."""
    count = clip_token_counter()
    lengths = [12, 12, 12, 25, 40]
    captions = make_captions([("a red apple on a blue background", "three cats")] * 5, lengths, count)
    assert len(set(captions)) == 5
    assert [count(caption) for caption in captions] == lengths


def test_data_is_made_once_and_read_back_in_order(tmp_path: Path) -> None:
    """A second run would train on rows in another order, or make everything again."""
    make_data(tmp_path, 4, 0, processes=1)
    rows = read_table(tmp_path / "natural.csv")
    assert [path.name for path, _ in rows] == [f"{i:05d}.jpg" for i in range(4)]
    with Image.open(rows[0][0]) as image:
        assert image.format == "JPEG"
    assert sum(about_data(tmp_path)["captions"]["uniform"].values()) == 4
    rows[0][0].unlink()
    make_data(tmp_path, 4, 0, processes=1)
    assert not rows[0][0].exists()
