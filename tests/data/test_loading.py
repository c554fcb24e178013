"""Batches of images and pairs: complete, in order, and the same again when a run is resumed."""

from __future__ import annotations

import multiprocessing
import random
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from clipgraft.data.datasets import Pairs
from clipgraft.data.loading import ImageDataset, PairBatch, PairBatches, epoch_batches, image_batches
from clipgraft.errors import DataError
from clipgraft.pictures import ImageError

Transform = Callable[[Image.Image], Tensor]
PLAIN: Transform = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])


class Augment:
    """A transform that draws from all three random generators that augmentations use."""

    def __call__(self, image: Image.Image) -> Tensor:
        """(3, H, W): the picture plus one random number a channel."""
        noise = torch.tensor([random.random(), float(np.random.rand()), torch.rand(()).item()])
        return PLAIN(image) + noise[:, None, None]


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """Ten 4x4 images; the red value of image i is 20 i."""
    paths = [tmp_path / f"{i}.png" for i in range(10)]
    for i, path in enumerate(paths):
        Image.new("RGB", (4, 4), (20 * i, 0, 0)).save(path)
    return paths


@pytest.fixture
def pairs(images: list[Path]) -> Pairs:
    """Ten images with 1, 2, 3, 1, 2, 3, ... captions that name their image."""
    return Pairs(tuple(images), tuple(tuple(f"{i}/{j}" for j in range(i % 3 + 1)) for i in range(10)))


def reds(batch: Tensor) -> list[int]:
    """Which images of the fixture a batch holds."""
    return [round(value) for value in (batch[:, 0, 0, 0] * 255 / 20).tolist()]


def test_image_dataset(images: list[Path]) -> None:
    """Features would be stored under another image's number."""
    dataset = ImageDataset(images, PLAIN)
    assert len(dataset) == 10
    index, image = dataset[7]
    assert index == 7
    assert image.shape == (3, 4, 4)
    assert reds(image[None]) == [7]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 3, 10, 64])
def test_image_batches_are_complete_and_in_order(images: list[Path], workers: int, batch_size: int) -> None:
    """An encoded folder would have images missing, doubled or swapped."""
    batches = list(image_batches(images, PLAIN, batch_size=batch_size, workers=workers))
    assert [len(ids) for ids, _ in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert torch.cat([ids for ids, _ in batches]).tolist() == list(range(10))
    assert [red for _, batch in batches for red in reds(batch)] == list(range(10))


def test_no_images_no_batches() -> None:
    """An empty folder would end in a traceback."""
    assert list(image_batches([], PLAIN, batch_size=4)) == []


def test_the_next_batch_is_decoded_meanwhile(images: list[Path]) -> None:
    """Without workers the model would stand still while images are decoded, and the other way round."""
    seen: list[int] = []
    second = threading.Event()

    def noting(image: Image.Image) -> Tensor:
        seen.append(round(PLAIN(image)[0, 0, 0].item() * 255 / 20))
        if seen[-1] == 3:
            second.set()
        return PLAIN(image)

    batches = image_batches(images, noting, batch_size=2, workers=0)
    assert next(batches)[0].tolist() == [0, 1]
    assert second.wait(timeout=60)
    batches.close()
    assert 9 not in seen
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_stopping_early_ends_the_workers(images: list[Path]) -> None:
    """Every stopped encoding would leave processes behind until the machine is full."""
    batches = image_batches(images, PLAIN, batch_size=1, workers=2)
    next(batches)
    assert multiprocessing.active_children()
    batches.close()
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("workers", [0, 2])
def test_image_that_breaks_later_is_named(images: list[Path], workers: int) -> None:
    """An image damaged after the check would show as a page of worker traceback, without its path."""
    images[6].write_bytes(b"\x89PNG\r\n\x1a\n")
    batches = image_batches(images, PLAIN, batch_size=4, workers=workers)
    assert next(batches)[0].tolist() == [0, 1, 2, 3]
    with pytest.raises(ImageError) as error:
        next(batches)
    assert error.value.path == str(images[6])
    assert "\n" not in str(error.value)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("workers", [0, 1])
def test_fault_in_a_transform_is_not_taken_for_a_bad_image(images: list[Path], workers: int) -> None:
    """A bug in a user's transform would be reported as a damaged file."""
    shape = v2.Compose([PLAIN, v2.LinearTransformation(torch.eye(5), torch.zeros(5))])
    with pytest.raises(ValueError, match="Input tensor"):
        list(image_batches(images, shape, batch_size=4, workers=workers))
    assert multiprocessing.active_children() == []


def test_jpeg_is_decoded_at_reduced_size(tmp_path: Path) -> None:
    """Encoding large photos would not be any faster with `shortest`."""
    Image.new("RGB", (256, 256)).save(tmp_path / "a.jpg")
    assert ImageDataset([tmp_path / "a.jpg"], PLAIN, shortest=64)[0][1].shape == (3, 64, 64)


@given(
    num_rows=st.integers(1, 200),
    batch_size=st.integers(1, 40),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 1000),
    drop_last=st.booleans(),
)
@settings(deadline=None)
def test_epoch_visits_every_row_once(
    num_rows: int, batch_size: int, seed: int, epoch: int, drop_last: bool
) -> None:
    """Some rows would never be trained on, or twice an epoch."""
    if drop_last and num_rows < batch_size:
        with pytest.raises(DataError, match=f"`batch_size={num_rows}` or less"):
            epoch_batches(num_rows, batch_size, seed, epoch, drop_last=drop_last)
        return
    batches = epoch_batches(num_rows, batch_size, seed, epoch, drop_last=drop_last)
    rows = np.concatenate(batches).tolist()
    assert len(rows) == len(set(rows))
    assert set(rows) <= set(range(num_rows))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert len(rows) == (num_rows // batch_size * batch_size if drop_last else num_rows)


def test_epoch_order_never_changes() -> None:
    """A run resumed after an upgrade would go on in another order than it began."""
    assert [batch.tolist() for batch in epoch_batches(7, 3, seed=5, epoch=2)] == [[0, 4, 5], [3, 1, 2]]


def test_epochs_and_seeds_differ() -> None:
    """Every epoch would see the same batches."""
    orders = [
        np.concatenate(epoch_batches(50, 10, seed, epoch)).tolist() for seed in (0, 1) for epoch in (0, 1, 2)
    ]
    assert len({tuple(order) for order in orders}) == 6


def test_order_ignores_global_random_state() -> None:
    """A resumed run would shuffle differently, because something else drew random numbers before."""
    first = np.concatenate(epoch_batches(50, 10, 3, 1)).tolist()
    np.random.seed(99)
    torch.manual_seed(99)
    assert np.concatenate(epoch_batches(50, 10, 3, 1)).tolist() == first


def same(one: PairBatch, other: PairBatch) -> bool:
    """Whether two batches are equal in every bit."""
    return one.captions == other.captions and all(
        torch.equal(a, b)
        for a, b in zip((one[0], one[2], one[3]), (other[0], other[2], other[3]), strict=True)
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_pair_batches_hold_together(pairs: Pairs, workers: int) -> None:
    """Captions would be trained against other images."""
    rows = pairs.rows()
    loader = PairBatches(pairs, PLAIN, batch_size=4, seed=0, workers=workers, drop_last=False)
    batches = list(loader.batches(epoch=0))
    assert len(batches) == len(loader) == 5
    for batch in batches:
        assert reds(batch.images) == batch.image_ids.tolist()
        assert [(i, c) for i, c in zip(batch.image_ids.tolist(), batch.captions, strict=True)] == [
            rows[row] for row in batch.caption_ids.tolist()
        ]
    assert sorted(row for batch in batches for row in batch.caption_ids.tolist()) == list(range(len(rows)))


def test_resume_repeats_order_and_augmentation(pairs: Pairs) -> None:
    """A resumed run, or one with another number of workers, would end in other weights."""
    whole = list(PairBatches(pairs, Augment(), batch_size=4, seed=7).batches(epoch=3))
    for workers, start in [(0, 2), (1, 0), (2, 1), (2, 4)]:
        random.seed(start)
        torch.manual_seed(start)
        rest = list(PairBatches(pairs, Augment(), batch_size=4, seed=7, workers=workers).batches(3, start))
        assert len(rest) == len(whole) - start
        assert all(same(one, other) for one, other in zip(rest, whole[start:], strict=True))


def test_augmentation_differs_between_rows_epochs_and_seeds(pairs: Pairs) -> None:
    """Augmentation would repeat itself, which is no augmentation."""
    noise = []
    for seed, epoch in [(0, 0), (0, 1), (1, 0)]:
        for batch in PairBatches(pairs, Augment(), batch_size=4, seed=seed, drop_last=False).batches(epoch):
            noise += (batch.images[:, :, 0, 0] * 1000 - batch.image_ids[:, None]).flatten().tolist()
    assert len(set(noise)) == len(noise) == 3 * 3 * len(pairs.rows())


@pytest.mark.parametrize("workers", [0, 2])
def test_training_random_state_is_left_alone(pairs: Pairs, workers: int) -> None:
    """Dropout would depend on the number of loader workers."""
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = [random.random(), float(np.random.rand()), torch.rand(()).item()]
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    list(PairBatches(pairs, Augment(), batch_size=4, seed=0, workers=workers).batches(0))
    assert [random.random(), float(np.random.rand()), torch.rand(()).item()] == expected


def test_unreadable_image_during_training_is_named(pairs: Pairs) -> None:
    """An image deleted during a long run would show as a page of worker traceback."""
    pairs.images[4].unlink()
    with pytest.raises(ImageError, match="not found") as error:
        list(PairBatches(pairs, PLAIN, batch_size=4, seed=0, workers=1, drop_last=False).batches(0))
    assert error.value.path == str(pairs.images[4])
