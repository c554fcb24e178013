"""Photographs to train on: EmojiScenes at 500x375 with camera noise, and captions of known length.

Real photographs cannot be shipped or downloaded. What a benchmark needs of them is what they cost: the pixels
to decode and resize, the bytes of the file (30-60 KB), and the length of the captions in CLIP tokens.
"""

from __future__ import annotations

import csv
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from clipgraft.emoji.scenes import EmojiScenes

WIDTH, HEIGHT = 500, 375
SHORTEST, LONGEST = 12, 40
VARIANTS = ("natural", "uniform")
_MEAN_BEYOND_SHORTEST = 6.0
_GRAIN, _SHADE, _QUALITY = 7.0, 14.0, 85
_DONE = "captions.json"

CountTokens = Callable[[str], int]


def make_data(folder: Path, images: int, seed: int, processes: int = 2) -> None:
    """Write `images` JPEGs and a CSV of captions for each variant into `folder`, unless they exist."""
    if (folder / _DONE).exists():
        return
    (folder / "images").mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(processes) as pool:
        list(pool.map(partial(_write_photo, folder, images, seed), range(images), chunksize=32))
    count = clip_token_counter()
    scenes = EmojiScenes("train", images, seed)
    histograms = {}
    for variant in VARIANTS:
        lengths = caption_lengths(variant, images, seed)
        captions = make_captions([scenes.captions(i) for i in range(images)], lengths, count)
        _write_table(folder / f"{variant}.csv", captions)
        histograms[variant] = dict(sorted(Counter(map(count, captions)).items()))
    sizes = sorted(path.stat().st_size for path in (folder / "images").iterdir())
    about = {"captions": histograms, "jpeg_bytes": {"median": sizes[len(sizes) // 2], "total": sum(sizes)}}
    (folder / _DONE).write_text(json.dumps(about, indent=1), encoding="utf-8")


def about_data(folder: Path) -> dict[str, dict[str, object]]:
    """Describe what `make_data` wrote: histograms of caption lengths, sizes of the JPEGs."""
    about: dict[str, dict[str, object]] = json.loads((folder / _DONE).read_text(encoding="utf-8"))
    return about


def read_table(path: Path) -> list[tuple[Path, str]]:
    """Read (image path, caption) of every row, in order."""
    with path.open(encoding="utf-8", newline="") as file:
        return [(path.parent / row["image"], row["caption"]) for row in csv.DictReader(file)]


def clip_token_counter() -> CountTokens:
    """Count the tokens of a caption in CLIP's vocabulary, start and end included."""
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    return lambda text: len(tokenizer.encode(text)) + 2


def caption_lengths(variant: str, number: int, seed: int) -> list[int]:
    """Draw the number of tokens of each caption, from SHORTEST to LONGEST.

    `natural` falls off exponentially, as captions that people write do: half of them have 16 tokens or
    fewer, and few have 40. `uniform` has every length equally often. Both are exact quantiles, shuffled.
    """
    shares = [(i + 0.5) / number for i in range(number)]
    if variant == "natural":
        lengths = [SHORTEST - _MEAN_BEYOND_SHORTEST * math.log(1 - share) for share in shares]
    else:
        lengths = [SHORTEST + (LONGEST - SHORTEST + 1) * share for share in shares]
    order = random.Random(f"{seed}/{variant}")
    keyed = sorted((order.random(), min(int(length), LONGEST)) for length in lengths)
    return [length for _, length in keyed]


def make_captions(
    sentences: Sequence[Sequence[str]], lengths: Sequence[int], count: CountTokens
) -> list[str]:
    """Make one caption an image, all different, with the wanted number of tokens or slightly fewer."""
    captions: dict[str, None] = {}
    for options, length in zip(sentences, lengths, strict=True):
        for start in range(len(options) * length):
            turn = start % len(options)
            words = ", ".join([*options[turn:], *options[:turn]]).split()
            skip = start // len(options) % len(words)
            caption = _cut([*words[skip:], *words * length], length, count)
            if caption not in captions:
                captions[caption] = None
                break
        else:
            raise ValueError(f"no unused caption of {length} tokens can be made of {options[0]!r}")
    return list(captions)


def _cut(words: Sequence[str], length: int, count: CountTokens) -> str:
    """Return the longest run of leading words with at most `length` tokens, and at least SHORTEST."""
    number = length - 2
    while number > 1 and count(" ".join(words[:number])) > length:
        number -= 1
    while count(" ".join(words[:number])) < SHORTEST:
        number += 1
    return " ".join(words[:number])


def photo(scenes: EmojiScenes, index: int, seed: int) -> Image.Image:
    """Draw scene `index` as a 500x375 photograph with uneven light and noise in every pixel."""
    noise = np.random.default_rng([seed, index])
    scene = scenes.image(index).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    light = Image.fromarray(noise.normal(128, 40, (6, 8)).clip(0, 255).astype(np.uint8))
    shade = np.asarray(light.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.float32) - 128
    grain = noise.standard_normal((HEIGHT, WIDTH, 3), np.float32)
    pixels = np.asarray(scene, np.float32) + _SHADE / 40 * shade[:, :, None] + _GRAIN * grain
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _write_photo(folder: Path, images: int, seed: int, index: int) -> None:
    photo(EmojiScenes("train", images, seed), index, seed).save(
        folder / _name(index), quality=_QUALITY, subsampling="4:2:0"
    )


def _name(index: int) -> str:
    return f"images/{index:05d}.jpg"


def _write_table(path: Path, captions: Sequence[str]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "caption"))
        writer.writerows((_name(index), caption) for index, caption in enumerate(captions))
