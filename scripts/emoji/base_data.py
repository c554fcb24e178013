"""What the base model is trained on: windows with one object, and scenes with a caption in some language."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from clipgraft.emoji.art import load_art, sprite
from clipgraft.emoji.drawing import ANGLES, COLOURS, PATTERNS, SHIFT, SIDE, Stream, background
from clipgraft.emoji.scenes import EmojiScenes

PATCH, WINDOW = 12, 48
LANGUAGES = ("en", "vi", "fr", "de", "es", "pt", "id", "tr")  # Greek came later: it is new to the base
ENGLISH_SHARE, VIETNAMESE_SHARE = 0.96, 0.0035


def make_images(scenes: EmojiScenes, rank: int, processes: int) -> np.ndarray:
    """Scenes rank, rank + processes, ... as uint8, (N / processes, 96, 96, 3)."""
    indices = range(rank, len(scenes), processes)
    images = np.empty((len(indices), SIDE, SIDE, 3), dtype=np.uint8)
    for row, index in enumerate(indices):
        images[row] = np.asarray(scenes.image(index))
    return images


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 (B, 96, 96, 3) to normalised float32 (B, 3, 96, 96), as the saved image processor does."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous()


def pick_language(which: float) -> str:
    """The language for a number drawn from 0..1: mostly English, some Vietnamese, the others equally."""
    if which < ENGLISH_SHARE:
        return "en"
    rest = which - ENGLISH_SHARE - VIETNAMESE_SHARE
    if rest < 0:
        return "vi"
    others = [language for language in LANGUAGES if language not in ("en", "vi")]
    return others[min(int(rest / (1 - ENGLISH_SHARE - VIETNAMESE_SHARE) * len(others)), len(others) - 1)]


def pick_captions(scenes: EmojiScenes, indices: list[int], step: int, seed: int) -> list[str]:
    """One caption a scene in a language drawn by its share; the same for the same seed and step."""
    draw = np.random.default_rng([seed, step]).random((len(indices), 2))
    pairs = zip(indices, draw, strict=True)
    return [scenes.captions(i, pick_language(which))[int(sentence * 5)] for i, (which, sentence) in pairs]


def window_place(size: int, stream: Stream) -> int:
    """Where an object of `size` pixels starts: on the grid of patches and a little off it, as in scenes."""
    slack = WINDOW - size
    place = PATCH * stream.below(slack // PATCH + 1) + stream.below(2 * SHIFT + 1) - SHIFT
    return min(max(place, 0), slack)


def draw_windows(batch: int, step: int, seed: int) -> tuple[np.ndarray, torch.Tensor]:
    """One object each on a piece of background: uint8 (batch, 48, 48, 3), and which object, (batch,)."""
    stream, art = Stream(f"window/{seed}/{step}"), load_art()
    images, labels = np.empty((batch, WINDOW, WINDOW, 3), dtype=np.uint8), []
    for i in range(batch):
        colour, pattern = tuple(COLOURS)[stream.below(len(COLOURS))], PATTERNS[stream.below(len(PATTERNS))]
        left, top = stream.below(SIDE - WINDOW + 1), stream.below(SIDE - WINDOW + 1)
        image = background(colour, pattern, stream.below(4)).crop((left, top, left + WINDOW, top + WINDOW))
        index, size = stream.below(len(art.objects)), (21, 24, 28, 32, 43, 48)[stream.below(6)]
        drawn = sprite(stream.below(len(art.styles)), index, size, ANGLES[stream.below(len(ANGLES))])
        image.paste(drawn, (window_place(size, stream), window_place(size, stream)), drawn)
        images[i] = np.asarray(image)
        labels.append(index)
    return images, torch.tensor(labels)


def batch_rows(step: int, batch: int, size: int, seed: int) -> list[int]:
    """The rows of one step among the images of a process: every epoch a new order of all."""
    per_epoch = size // batch
    epoch, place = divmod(step, per_epoch)
    order = np.random.default_rng([seed, 1_000_000 + epoch]).permutation(size)
    return [int(i) for i in order[place * batch : (place + 1) * batch]]


@dataclass(frozen=True)
class Shard:
    """The part of the training scenes that one process holds."""

    scenes: EmojiScenes
    images: np.ndarray
    rank: int
    processes: int

    def batch(self, step: int, size: int, seed: int) -> tuple[torch.Tensor, list[str]]:
        """Pixels, and one caption each, of the scenes of one step."""
        rows = batch_rows(step, size, len(self.images), seed)
        texts = pick_captions(self.scenes, [row * self.processes + self.rank for row in rows], step, seed)
        return to_pixels(self.images[rows]), texts
