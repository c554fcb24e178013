"""What is in an emoji scene, chosen from a string key, and how it is painted."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw

from clipgraft.emoji.art import load_art, sprite

SIDE = 96
SPLITS = ("train", "val", "test")
COLOURS = {
    "white": (246, 246, 244),
    "black": (34, 34, 38),
    "red": (214, 70, 66),
    "orange": (240, 150, 60),
    "yellow": (248, 220, 90),
    "green": (98, 172, 98),
    "blue": (86, 136, 216),
    "purple": (150, 104, 190),
    "pink": (244, 168, 196),
    "brown": (140, 104, 76),
    "grey": (152, 152, 156),
}
PATTERNS = ("plain", "gradient", "striped", "dotted", "checked")
ANGLES = (-8, 0, 8)
SCALES = (0.9, 1.0)
LARGEST = 64
SHIFT = 3

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Group:
    """`count` copies of object number `index`."""

    index: int
    count: int


@dataclass(frozen=True)
class Scene:
    """What one image shows: all that captions may speak of.

    Attributes:
        groups: one to three groups of different objects, in reading order.
        layout: "alone" (one group), "row" (left to right) or "column" (top to bottom).
        colour: background colour, a key of `COLOURS`.
        pattern: background pattern, one of `PATTERNS`.
        style: number of the art style.
    """

    groups: tuple[Group, ...]
    layout: str
    colour: str
    pattern: str
    style: int


class Stream:
    """Random numbers that depend on a string key only.

    Uses `random.Random.random`, the one generator method that Python promises never to change.
    """

    def __init__(self, key: str) -> None:
        self._random = random.Random(int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "big")).random

    def below(self, n: int) -> int:
        """A whole number from 0 to n-1."""
        return int(self._random() * n)

    def weighted(self, weights: Sequence[float]) -> int:
        """A position in `weights`, which sum to 1, with that probability."""
        left = self._random()
        for i, weight in enumerate(weights[:-1]):
            left -= weight
            if left < 0:
                return i
        return len(weights) - 1


def combination_split(codes: Sequence[str]) -> str:
    """The split that a set of objects belongs to, for every seed: 80 % train, 10 % val, 10 % test.

    Args:
        codes: code points of the objects, in any order.
    """
    key = "|".join(sorted(codes))
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 10
    return {0: "val", 1: "test"}.get(bucket, "train")


_COUNTS = {1: (0.25, 0.25, 0.25, 0.25), 2: (0.58, 0.18, 0.14, 0.10), 3: (0.72, 0.18, 0.10)}


def draw_scene(key: str, split: str) -> Scene:
    """The scene of a key such as "0/train/17", drawn until its combination falls into `split`."""
    stream, art = Stream(f"scene/{key}"), load_art()
    kinds = 1 + stream.weighted((0.12, 0.63, 0.25))
    while True:
        chosen: list[int] = []
        while len(chosen) < kinds:
            index = stream.below(len(art.objects))
            if index not in chosen:
                chosen.append(index)
        if combination_split([art.objects[i].code for i in chosen]) == split:
            break
    return arrange(stream, chosen, _COUNTS[kinds], range(len(art.styles)))


def arrange(stream: Stream, chosen: Sequence[int], counts: Sequence[float], styles: Sequence[int]) -> Scene:
    """Choose everything but the objects of a scene.

    Args:
        stream: decides.
        chosen: numbers of the objects, in reading order.
        counts: how probable one, two, three and four copies of an object are.
        styles: numbers of the art styles to choose from.
    """
    groups = tuple(Group(index, 1 + stream.weighted(counts)) for index in chosen)
    layout = "alone" if len(groups) == 1 else ("row", "column")[stream.below(2)]
    colour = tuple(COLOURS)[stream.below(len(COLOURS))]
    pattern = PATTERNS[stream.below(len(PATTERNS))]
    return Scene(groups, layout, colour, pattern, styles[stream.below(len(styles))])


def _cells_alone(count: int) -> list[Box]:
    half = SIDE // 2
    return {
        1: [(0, 0, SIDE, SIDE)],
        2: [(0, 0, half, SIDE), (half, 0, half, SIDE)],
        3: [(0, 0, half, half), (half, 0, half, half), (half // 2, half, half, half)],
        4: [(0, 0, half, half), (half, 0, half, half), (0, half, half, half), (half, half, half, half)],
    }[count]


def _cells_in_row(place: int, kinds: int, count: int) -> list[Box]:
    width = SIDE // kinds
    left = place * width
    if count == 4:
        half = width // 2
        return [(left + x * half, y * SIDE // 2, half, SIDE // 2) for y in (0, 1) for x in (0, 1)]
    height = SIDE // count
    return [(left, i * height, width, height) for i in range(count)]


def cells(scene: Scene, place: int) -> list[Box]:
    """Where the copies of the group at `place` go: (left, top, width, height) in pixels."""
    count = scene.groups[place].count
    if scene.layout == "alone":
        return _cells_alone(count)
    boxes = _cells_in_row(place, len(scene.groups), count)
    return boxes if scene.layout == "row" else [(y, x, h, w) for x, y, w, h in boxes]


def _mix(colour: tuple[int, int, int], other: int, percent: int) -> tuple[int, int, int]:
    r, g, b = ((c * (100 - percent) + other * percent) // 100 for c in colour)
    return r, g, b


@cache
def background(colour: str, pattern: str, variant: int) -> Image.Image:
    """One of four variants of a background, 96x96 RGB; shared, so copy before drawing."""
    base = _mix(COLOURS[colour], 255 if variant % 2 else 0, 5 * (variant // 2))
    other = _mix(base, 0 if colour in ("white", "yellow") else 255, 14 if colour == "white" else 26)
    image = Image.new("RGB", (SIDE, SIDE), base)
    draw = ImageDraw.Draw(image)
    step = 12
    if pattern == "gradient":
        mask = Image.linear_gradient("L").resize((SIDE, SIDE)).rotate(90 * variant)
        image.paste(Image.new("RGB", (SIDE, SIDE), other), (0, 0), mask)
    elif pattern == "striped":
        for i in range(0, SIDE, 2 * step):
            box = (i, 0, i + step - 1, SIDE) if variant % 2 else (0, i, SIDE, i + step - 1)
            draw.rectangle(box, fill=other)
    elif pattern == "dotted":
        for x in range(step // 2 + variant, SIDE, step + 4):
            for y in range(step // 2, SIDE, step + 4):
                draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=other)
    elif pattern == "checked":
        for x in range(0, SIDE, step):
            for y in range(step * (x // step % 2), SIDE, 2 * step):
                draw.rectangle((x, y, x + step - 1, y + step - 1), fill=other)
    return image


def paint(scene: Scene, key: str) -> Image.Image:
    """The scene as a 96x96 RGB image; `key` decides sizes, turns and small shifts."""
    stream = Stream(f"paint/{key}")
    image = background(scene.colour, scene.pattern, stream.below(4)).copy()
    for place, group in enumerate(scene.groups):
        for left, top, width, height in cells(scene, place):
            size = int(min(width, height, LARGEST) * SCALES[stream.below(len(SCALES))])
            drawn = sprite(scene.style, group.index, size, ANGLES[stream.below(len(ANGLES))])
            x, y = left + _nudged(width - size, stream), top + _nudged(height - size, stream)
            image.paste(drawn, (x, y), drawn)
    return image


def _nudged(slack: int, stream: Stream) -> int:
    """The middle of `slack` pixels, up to SHIFT to either side, never outside."""
    return min(max(slack // 2 - SHIFT + stream.below(2 * SHIFT + 1), 0), slack)
