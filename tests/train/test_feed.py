"""Batches: their order, what they hold, and how they are cut."""

from __future__ import annotations

import pytest
import torch

import clipgraft as cg
from clipgraft.models.clip import Clip
from clipgraft.train.feed import Feed


def rows(feed: Feed, epoch: int, start: int = 0) -> list[list[tuple[int, int]]]:
    return [
        [
            pair
            for part in batch
            for pair in zip(part.image_ids.tolist(), part.caption_ids.tolist(), strict=True)
        ]
        for batch in feed.batches(epoch, start)
    ]


def test_an_epoch_shows_every_pair_once(pairs: cg.Pairs) -> None:
    """Some captions would never be trained on, or twice as often as others."""
    feed = Feed(pairs, 4, 1, 0, None, 0)
    seen = [pair for batch in rows(feed, 0) for pair in batch]
    wanted = [(image, feed.captions.index(caption)) for image, caption in pairs.rows()]
    assert sorted(seen) == sorted(wanted)
    assert rows(feed, 0) != rows(feed, 1), "every epoch is shuffled anew"


def test_accumulation_changes_no_batch(pairs: cg.Pairs) -> None:
    """`--batch-size 3 --accum-freq 4` is documented to train what `--batch-size 12` trains."""
    whole, cut = Feed(pairs, 12, 1, 5, None, 0), Feed(pairs, 3, 4, 5, None, 0)
    assert rows(whole, 2) == rows(cut, 2)
    assert [len(part.image_ids) for part in next(cut.batches(0, 0))] == [3, 3, 3, 3]


def test_equal_captions_have_equal_ids(pairs: cg.Pairs) -> None:
    """Equal captions of different images would be taken for negatives."""
    feed = Feed(pairs, 24, 1, 0, None, 0)
    (batch,) = rows(feed, 0)
    shared = {caption for _, caption in batch if feed.captions[caption] == "the same words"}
    assert len(shared) == 1
    assert len(feed.captions) == len(set(feed.captions)) == 22


@pytest.mark.parametrize("accum_freq", [1, 3])
def test_pixels_belong_to_their_ids(pairs: cg.Pairs, clip: Clip, accum_freq: int) -> None:
    """Images would be trained with the captions of others."""
    from clipgraft.pictures import open_image

    assert clip.preprocess is not None
    feed = Feed(pairs, 4, accum_freq, 0, clip.preprocess, 0)
    for batch in feed.batches(1, 1):
        for part in batch:
            assert part.pixels is not None
            for image, pixels in zip(part.image_ids.tolist(), part.pixels, strict=True):
                assert torch.equal(pixels, clip.preprocess(open_image(pairs.images[image])))


def test_pixels_come_in_the_order_of_ids_alone(pairs: cg.Pairs, clip: Clip) -> None:
    """A resumed run starts inside an epoch and must meet the same batches; so must a frozen tower's run."""
    live, fixed = (Feed(pairs, 2, 3, 4, transform, 0) for transform in (clip.preprocess, None))
    assert live.steps == fixed.steps == 4
    assert rows(live, 3) == rows(fixed, 3)
    assert rows(live, 3, 2) == rows(fixed, 3)[2:]


@pytest.mark.parametrize(
    ("batch_size", "accum_freq", "told"),
    [
        (25, 1, "use `batch_size=24` or less"),
        (7, 4, "use `batch_size=6` or less"),
        (2, 13, "lower `accum_freq`"),
    ],
)
def test_too_few_pairs_say_what_would_fit(
    pairs: cg.Pairs, batch_size: int, accum_freq: int, told: str
) -> None:
    """An epoch without a step would train nothing, and silently."""
    with pytest.raises(cg.errors.DataError, match=f"24 captions do not fill one batch .*{told}"):
        Feed(pairs, batch_size, accum_freq, 0, None, 0)


def test_turns_go_through_all_views(pairs: cg.Pairs) -> None:
    """A cached view would never be trained on, or all captions of an image would see one crop an epoch."""
    feed = Feed(pairs, 4, 2, 0, None, 0)
    seen: dict[tuple[int, int], list[int]] = {}
    for epoch in range(3):
        of_image: dict[int, list[int]] = {}
        for batch in feed.batches(epoch, 0):
            for part in batch:
                for image, caption, turn in zip(part.image_ids, part.caption_ids, part.turns, strict=True):
                    seen.setdefault((int(image), int(caption)), []).append(int(turn))
                    of_image.setdefault(int(image), []).append(int(turn))
        assert all(sorted(turns) == [epoch, epoch + 1] for turns in of_image.values())
    assert all(turns in ([0, 1, 2], [1, 2, 3]) for turns in seen.values())


@pytest.mark.parametrize("transform", [None, "pixels"])
def test_a_number_of_steps_goes_over_the_data_as_often_as_needed(
    transform: str | None, clip: Clip, pairs: cg.Pairs
) -> None:
    """A run of so many steps leaves rows out, repeats crops, or is resumed on other batches."""
    preprocess = None if transform is None else clip.require_preprocess()
    feed = Feed(pairs, 10, 1, 0, preprocess, 0, steps=7)
    batches = [batch[0] for batch in feed.batches(0, 0)]
    assert [len(part.image_ids) for part in batches] == [10, 10, 4, 10, 10, 4, 10]
    for first in (0, 3):
        rows = torch.cat([part.caption_ids for part in batches[first : first + 3]])
        assert rows.sort().values.equal(feed.caption_of_row.sort().values), "each row once a pass"
    assert not batches[0].caption_ids.equal(batches[3].caption_ids)
    rest = [batch[0] for batch in feed.batches(0, 4)]
    assert all(a.caption_ids.equal(b.caption_ids) for a, b in zip(rest, batches[4:], strict=True))
