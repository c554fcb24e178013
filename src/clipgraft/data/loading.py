"""Load images and pairs as batches, in an order and augmentation that a resumed run repeats."""

from __future__ import annotations

import itertools
import os
import random
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from clipgraft.data.datasets import Pairs
from clipgraft.data.preprocessing import FastPreprocess
from clipgraft.errors import DataError
from clipgraft.pictures import ImageError, open_image

Transform = Callable[[Image.Image], Tensor]
Indices = npt.NDArray[np.int64]

_AHEAD = 2  # batches made before they are asked for, as by each worker process

_Key = TypeVar("_Key")
_Made = TypeVar("_Made")


class PairBatch(NamedTuple):
    """One training batch of B rows.

    `images` is float (B, 3, H, W); `captions` has B strings; `image_ids` and `caption_ids` are int64 (B,):
    the index into `Pairs.images`, and the row in `Pairs.rows()`.
    """

    images: Tensor
    captions: list[str]
    image_ids: Tensor
    caption_ids: Tensor


class ImageDataset(Dataset[tuple[int, Tensor]]):
    """`dataset[i]` is (i, transform(image i)). Raises ImageError where the file cannot be used.

    `shortest` is handed to `open_image`: the smallest side that a JPEG may be decoded at.
    """

    def __init__(
        self, images: Sequence[str | Path], transform: Transform, *, shortest: int | None = None
    ) -> None:
        self.images = images
        self.transform = transform
        self.shortest = shortest

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        return index, self.transform(open_image(self.images[index], shortest=self.shortest))

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return (int64 indices (B,), images (B, 3, H, W))."""
        ids, images = default_collate([self[index] for index in indices])
        return ids, images


def image_batches(
    images: Sequence[str | Path], transform: Transform, *, batch_size: int, workers: int = 0
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Go over all images once, in order: yields (int64 indices (B,), images (B, 3, H, W)); the last may be
    smaller.

    The next batches are decoded while the caller works on this one: by `workers` processes, or with 0 by one
    thread. They end when the iteration ends or is closed. A `FastPreprocess` says itself how small a JPEG may
    be decoded, and its 8-bit pixels are normalised here.
    Raises ImageError, with the path, at an image that cannot be used.
    """
    starts = range(0, len(images), batch_size)
    batches = [range(start, min(start + batch_size, len(images))) for start in starts]
    fast = transform if isinstance(transform, FastPreprocess) else None
    if fast is None:
        dataset = ImageDataset(images, transform)
    else:
        dataset = ImageDataset(images, fast.pixels, shortest=fast.shortest)
    with closing(prefetch(dataset.batch, batches, workers)) as made:
        for ids, pixels in made:
            yield ids, pixels if fast is None else fast.finish(pixels)


def prefetch(
    make: Callable[[_Key], _Made], keys: Iterable[_Key], workers: int = 0
) -> Generator[_Made, None, None]:
    """Yield `make(key)` for each key in order; processes, or with 0 a thread, make the next ones meanwhile.

    Keys are taken as they are needed, a few ahead. `make` draws no random numbers.
    """
    return _in_workers(make, keys, workers) if workers else _in_thread(make, keys)


def epoch_batches(
    num_rows: int, batch_size: int, seed: int, epoch: int, *, drop_last: bool = True
) -> list[Indices]:
    """Shuffle rows into the batches of one epoch, by a permutation that depends on (seed, epoch) alone.

    A run that is resumed at batch k of an epoch therefore goes on with element k of the same list. With
    `drop_last` the rows that do not fill a batch are left out of this epoch; every epoch leaves out others.

    Raises DataError when `drop_last` would leave no batch at all.
    """
    if drop_last and num_rows < batch_size:
        raise DataError(
            f"{num_rows} rows do not fill one batch of {batch_size}; set `batch_size={num_rows}` or less"
        )
    order = np.random.default_rng([seed, epoch]).permutation(num_rows)
    end = num_rows - num_rows % batch_size if drop_last else num_rows
    return [order[start : min(start + batch_size, end)] for start in range(0, end, batch_size)]


def batch_order(
    num_rows: int, batch_size: int, seed: int, epoch: int, *, drop_last: bool = True, count: int | None = None
) -> list[tuple[int, Indices]]:
    """Return the batches of an epoch as `epoch_batches` shuffles them, each with the number of its pass.

    An epoch is one pass over the rows, that of its own number; or with `count` that many batches, over as
    many passes as it takes. Raises DataError as `epoch_batches` does.
    """
    found: list[tuple[int, Indices]] = []
    for number in itertools.count(epoch):
        batches = epoch_batches(num_rows, batch_size, seed, number, drop_last=drop_last)
        found += [(number, rows) for rows in batches]
        if count is None or len(found) >= count:
            break
    return found[:count]


class PairBatches:
    """Shuffled training batches with images decoded and augmented afresh in every pass over the data.

    Order and augmentation depend on (seed, pass, row) alone: not on the number of workers, nor on where in
    the epoch the run was resumed. The random state of the training process is left as it was.
    """

    def __init__(
        self,
        pairs: Pairs,
        transform: Transform,
        *,
        batch_size: int,
        seed: int,
        workers: int = 0,
        drop_last: bool = True,
        rank: int = 0,
        world_size: int = 1,
        count: int | None = None,
    ) -> None:
        """Take every `world_size`-th batch of an epoch, from `rank` on: the share of one process.

        With `count` there is one epoch, of so many batches in all processes, over several passes.
        """
        self._rows = pairs.rows()
        self._dataset = ImageDataset(pairs.images, transform)
        self._batch_size = batch_size
        self._seed = seed
        self._workers = workers
        self._drop_last = drop_last
        self._turns = slice(rank, None, world_size)
        self._count = count

    def __len__(self) -> int:
        """Count the batches of this process in one epoch."""
        return len(self._order(0))

    def batches(self, epoch: int, start: int = 0) -> Generator[PairBatch, None, None]:
        """Yield one epoch's batches from number `start` on; raises ImageError for an unusable image."""
        return _in_workers(self._batch, self._order(epoch)[start:], self._workers)

    def _order(self, epoch: int) -> list[tuple[int, Indices]]:
        order = batch_order(
            *(len(self._rows), self._batch_size, self._seed, epoch),
            drop_last=self._drop_last,
            count=self._count,
        )
        return order[self._turns]

    def _batch(self, key: tuple[int, Indices]) -> PairBatch:
        number, ids = key[0], key[1].tolist()
        image_ids = [self._rows[row][0] for row in ids]
        images = []
        for row, image in zip(ids, image_ids, strict=True):
            with seeded(self._seed, number, row):
                images.append(self._dataset[image][1])
        captions = [self._rows[row][1] for row in ids]
        return PairBatch(default_collate(images), captions, torch.tensor(image_ids), torch.tensor(ids))


class _Maker(Dataset["_Made | ImageError"], Generic[_Key, _Made]):
    """Make a whole batch from its key; hand an ImageError back as a value.

    An exception raised in a worker reaches the user as a page of traceback, with the message inside it.
    """

    def __init__(self, make: Callable[[_Key], _Made]) -> None:
        self._make = make

    def __getitem__(self, key: _Key) -> _Made | ImageError:
        try:
            return self._make(key)
        except ImageError as error:
            return error


def _in_workers(
    make: Callable[[_Key], _Made], keys: Iterable[_Key], workers: int
) -> Generator[_Made, None, None]:
    """Yield `make(key)` for each key in order, made ahead by worker processes."""
    loader: DataLoader[_Made | ImageError] = DataLoader(
        _Maker(make),
        sampler=keys,
        batch_size=None,
        num_workers=min(workers, _usable_cores()),
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # else the loader draws from the training run's random numbers
    )
    iterator = _start(loader)
    try:
        for made in iterator:
            if isinstance(made, ImageError):
                raise made
            yield made
    finally:
        # Left to the garbage collector, the workers live as long as the traceback of an exception that passed
        # by here, and then take 5 s each to end, because their queues are collected before they are told to
        # stop.
        shut_down = getattr(iterator, "_shutdown_workers", None)
        if shut_down is not None:
            shut_down()


def _in_thread(make: Callable[[_Key], _Made], keys: Iterable[_Key]) -> Generator[_Made, None, None]:
    """Yield `make(key)` for each key in order, made one ahead by a thread; `make` draws no random numbers."""
    waiting: deque[Future[_Made]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="decode") as pool:
        try:
            for key in keys:
                waiting.append(pool.submit(make, key))
                if len(waiting) > _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _start(loader: DataLoader[_Made]) -> Iterator[_Made]:
    with warnings.catch_warnings():
        # Python 3.12 warns of any fork beside threads. The workers decode and resize; they take none of
        # torch's locks.
        warnings.filterwarnings("ignore", message=".*use of fork", category=DeprecationWarning)
        return iter(loader)


def _as_it_is(made: _Made) -> _Made:
    return made


def _usable_cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


@contextmanager
def seeded(seed: int, epoch: int, row: int) -> Iterator[None]:
    """Start every global CPU random generator from (seed, epoch, row); afterwards put all back as it was."""
    python, numpy, pytorch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    words = np.random.SeedSequence([seed, epoch, row]).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    # torch.manual_seed would also seed the GPUs, whose state cannot be put back from a worker.
    torch.default_generator.manual_seed(int(words[2]))
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(pytorch)


@dataclass(frozen=True)
class SeededView:
    """An augmentation that depends on (seed, view, pixels of the image) alone.

    The place of an image in its table, or of its file on disk, plays no part.
    """

    transform: Transform
    seed: int
    view: int

    def __call__(self, image: Image.Image) -> Tensor:
        with seeded(self.seed, self.view, zlib.crc32(image.tobytes())):
            return self.transform(image)
