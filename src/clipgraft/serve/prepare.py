"""From texts and files to inputs of a model: tokens and pixels, each item by itself."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias

from PIL.Image import Image
from torch import Tensor

from clipgraft.data.features import image_steps
from clipgraft.data.preprocessing import FastPreprocess
from clipgraft.errors import ItemError
from clipgraft.models.clip import Clip
from clipgraft.models.sites import Tower
from clipgraft.pictures import ImageError, open_image
from clipgraft.serve.batcher import Row
from clipgraft.serve.computing import alone
from clipgraft.serve.messages import Item, Picture, Text

CHARACTERS = 64
"""Of a text the first so many characters for each token of the context are read. What follows is beyond the
context anyway, and some tokenizers take a time that grows with the square of a word."""

_TEXTS_AT_ONCE = 256
_NARROWEST = 100
_POSTSCRIPT = (b"%!PS", b"\xc5\xd0\xd3\xc6")
_Texts: TypeAlias = Sequence[tuple[int, str]]
_Read: TypeAlias = tuple[list[Row], list[int]]


@dataclass(frozen=True)
class Prepared:
    """Items of a request as a model takes them.

    Attributes:
        rows: of each tower, in the order of its items.
        numbers: the number of each of those items in the request.
        tokens: how many tokens or patches each item was read as.
        cut: the numbers of the texts that are longer than the context.
    """

    rows: dict[Tower, list[Row]]
    numbers: dict[Tower, list[int]]
    tokens: tuple[int, ...]
    cut: tuple[int, ...]


class Preparer:
    """Prepares items in threads of its own: texts in one, pictures in several."""

    def __init__(self, clip: Clip, threads: int) -> None:
        self._clip = clip
        self._context = clip.context_length
        self._texts = ThreadPoolExecutor(1, "clipgraft-tokens", initializer=alone)
        self._asked: deque[tuple[_Texts, Future[_Read]]] = deque()
        self._pictures = ThreadPoolExecutor(threads, "clipgraft-pictures", initializer=alone)
        vision = clip.family.vision_tower(clip.model)
        self._patches = 0 if vision is None else len(vision.positions.matrix)

    def close(self) -> None:
        """Stop the threads."""
        for pool in (self._texts, self._pictures):
            pool.shutdown(wait=False, cancel_futures=True)

    async def prepare(self, items: Sequence[Item]) -> Prepared:
        """Prepare items, in their order; called in an event loop.

        Raises:
            ItemError: an item cannot be used.
        """
        texts = [(n, item.text) for n, item in enumerate(items) if isinstance(item, Text)]
        pictures = [(n, item.content) for n, item in enumerate(items) if isinstance(item, Picture)]
        (rows, counts), *images = await all_of(
            [self._tokenized(texts)]
            + [self._in(self._pictures, self._picture, *picture) for picture in pictures]
        )
        numbers = [n for n, _ in texts], [n for n, _ in pictures]
        read = {**dict(zip(numbers[0], counts, strict=True))}
        read |= {n: image.cost for n, image in zip(numbers[1], images, strict=True)}
        parts: list[tuple[Tower, list[Row], list[int]]] = [
            ("text", rows, numbers[0]),
            ("vision", images, numbers[1]),
        ]
        return Prepared(
            {tower: rows for tower, rows, _ in parts if rows},
            {tower: numbers for tower, rows, numbers in parts if rows},
            tuple(read[n] for n in range(len(items))),
            tuple(n for n in numbers[0] if read[n] > self._context),
        )

    async def _in(self, pool: ThreadPoolExecutor, function: Callable[..., Any], *arguments: object) -> Any:
        return await asyncio.wrap_future(pool.submit(function, *arguments))

    async def _tokenized(self, texts: _Texts) -> _Read:
        """Rows of numbered texts, and how many tokens each has."""
        if not texts:
            return [], []
        future: Future[_Read] = Future()
        self._asked.append((texts, future))
        self._texts.submit(self._tokenize_asked)
        return await asyncio.wrap_future(future)

    def _tokenize_asked(self) -> None:
        """Tokenize the texts of all requests that wait: a call costs more than a text."""
        taken: list[tuple[_Texts, Future[_Read]]] = []
        count = 0
        while self._asked and count < _TEXTS_AT_ONCE:
            texts, future = self._asked.popleft()
            if future.set_running_or_notify_cancel():
                taken.append((texts, future))
                count += len(texts)
        try:
            rows, counts = self._read([text for texts, _ in taken for text in texts])
        except ItemError:
            for texts, future in taken:
                try:
                    future.set_result(self._read(texts))
                except ItemError as error:
                    future.set_exception(error)
            return
        start = 0
        for texts, future in taken:
            own = slice(start, start + len(texts))
            future.set_result((rows[own], counts[own]))
            start = own.stop

    def _read(self, texts: _Texts) -> _Read:
        if not texts:
            return [], []
        limit = CHARACTERS * self._context
        told = [text[:limit] for _, text in texts]
        try:
            ids = self._clip.tokenize(told)
            counts = self._counts(told, ids)
        except Exception as error:  # whatever a strange text makes a tokenizer raise
            if len(texts) > 1:
                for text in texts:
                    self._read([text])
            reason = f"the text cannot be read ({' '.join(str(error).split())[:200]})"
            raise ItemError(texts[0][0], reason) from error
        ends = self._clip.family.text_ends(self._clip.model, ids)
        costs = [self._context] * len(texts) if ends is None else (ends + 1).tolist()
        return [Row(row, cost) for row, cost in zip(ids, costs, strict=True)], counts

    def _counts(self, texts: Sequence[str], ids: Tensor) -> list[int]:
        """Tokens of every text before it was cut, counted anew only where the context is full."""
        ends = self._clip.family.text_ends(self._clip.model, ids)
        if ends is None:
            return self._clip.count_tokens(texts)
        counts: list[int] = (ends + 1).tolist()
        full = [n for n, count in enumerate(counts) if count >= ids.shape[1]]
        for n, count in zip(full, self._clip.count_tokens([texts[n] for n in full]), strict=True):
            counts[n] = count
        return counts

    def _picture(self, number: int, content: bytes) -> Row:
        steps = image_steps(self._clip)
        try:
            if content.startswith(_POSTSCRIPT):
                raise ImageError("<bytes>", "is a PostScript program; convert it to JPEG or PNG")
            shortest = steps.shortest if isinstance(steps, FastPreprocess) else None
            image = open_image(content, shortest=shortest)
            _check_shape(image)
            pixels = steps(image)
        except ImageError as error:
            raise ItemError(number, error.reason) from error
        except Exception as error:  # whatever a preprocessing of elsewhere makes of a strange image
            reason = f"cannot be preprocessed ({' '.join(str(error).split())[:200]})"
            raise ItemError(number, reason) from error
        return Row(pixels, self._patches or _patches(pixels))


def _check_shape(image: Image) -> None:
    """Refuse images so narrow that their longer side would become huge where the shorter one is resized."""
    short, long = sorted(image.size)
    if long > _NARROWEST * short:
        raise ImageError(
            "<bytes>",
            f"{image.width}x{image.height} is more than {_NARROWEST} times as long as wide; crop it",
        )


def _patches(pixels: Tensor) -> int:
    """A guess at what an image costs a tower that the engine does not compute: patches of 16 pixels."""
    return max(1, pixels.numel() // 768)


async def all_of(coroutines: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    """The results of all; the first failure cancels the others."""
    tasks = [asyncio.ensure_future(each) for each in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
