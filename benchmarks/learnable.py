"""A random ViT-B-32 that can learn, and pairs for it: coloured squares, and what they look like in words.

The features of a random image tower hardly differ from picture to picture. So its projection is replaced by
the directions in which these pictures differ most, each of unit variance and without their mean, as training
would separate what is to be told apart. The text tower stays random: all that is learnt, it learns.
"""

from __future__ import annotations

import csv
import random
from itertools import product
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (40, 70, 220),
    "yellow": (240, 220, 50),
    "black": (15, 15, 15),
    "white": (245, 245, 245),
    "orange": (245, 140, 30),
    "purple": (140, 50, 170),
    "pink": (250, 160, 190),
    "brown": (120, 75, 40),
}
SIDES = {"tiny": 40, "small": 76, "large": 112, "huge": 156}
TEMPLATES = (
    "a {size} {front} square on {back}",
    "{back} paper with a {size} {front} square in it",
    "a square, {size} and {front}, before a {back} wall",
    "something {front} and {size} on a {back} ground",
)
DIRECTIONS = 24
_SIDE, _JITTER = 224, 12


def write_squares(folder: Path, sizes: dict[str, int], seed: int = 0) -> None:
    """Write pictures and `<split>.csv` of each split; no two pictures show the same."""
    drawn = random.Random(seed)
    shown = [s for s in product(SIDES, COLOURS, COLOURS) if s[1] != s[2]]
    drawn.shuffle(shown)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for split, count in sizes.items():
        rows = []
        for size, front, back in (shown.pop() for _ in range(count)):
            name = f"images/{size}_{front}_{back}.png"
            _draw(drawn, size, front, back).save(folder / name)
            rows += [(name, text.format(size=size, front=front, back=back)) for text in TEMPLATES]
        with (folder / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("image", "caption"), *rows])


def _draw(drawn: random.Random, size: str, front: str, back: str) -> Image.Image:
    def shade(name: str) -> tuple[int, ...]:
        return tuple(max(0, min(255, c + drawn.randint(-_JITTER, _JITTER))) for c in COLOURS[name])

    image, side = Image.new("RGB", (_SIDE, _SIDE), shade(back)), SIDES[size]
    left, top = (drawn.randrange(_SIDE - side) for _ in "xy")
    ImageDraw.Draw(image).rectangle((left, top, left + side, top + side), fill=shade(front))
    return image


@torch.no_grad()
def spread(model: nn.Module, pixels: Tensor) -> None:
    """Give open_clip's image tower the projection under which these pixels (N, 3, H, W) differ."""
    visual: Any = model.visual
    size = visual.proj.shape
    whole = torch.eye(size[0])
    visual.proj = nn.Parameter(whole)
    states = torch.cat([visual(part) for part in pixels.split(32)]).double()  # type: ignore[no-untyped-call]
    centre = torch.nn.functional.normalize(states.mean(0), dim=0)
    apart = states - states.mean(0)
    apart -= (apart @ centre)[:, None] * centre
    _, deviations, directions = torch.linalg.svd(apart, full_matrices=False)
    kept = directions[:DIRECTIONS] / deviations[:DIRECTIONS, None]
    projection = torch.zeros(size, dtype=torch.float64)
    projection[:, :DIRECTIONS] = kept.T - centre[:, None] * (centre @ kept.T)
    visual.proj = nn.Parameter((projection * len(pixels) ** 0.5).float())
