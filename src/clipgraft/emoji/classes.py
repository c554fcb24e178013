"""Emoji pictures with one class each: folders of class folders to tune a classifier on.

The classes are the categories of the shipped art, each with six or more different objects: "bird" shows
swans, owls and parrots. All objects of a picture are of its class. Train and validation pictures are drawn in
two of the three art styles and test pictures in the third, so the test split asks whether a class is known in
a style that the classifier was not tuned on. Everything follows from (seed, split, class, index).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from PIL import Image

from clipgraft.emoji.art import load_art
from clipgraft.emoji.drawing import SPLITS, Scene, Stream, arrange, paint
from clipgraft.emoji.scenes import write_image
from clipgraft.errors import DataError
from clipgraft.writing import writing

TEST_STYLE = "openmoji"

# A category of four or five objects joins its neighbour, and snails and spiders are no insects.
_CLASS_OF = {"flower": "plant", "boat": "vehicle", "insect": "bug"}
_KINDS = (0.45, 0.35, 0.20)
_COUNTS = {1: (0.4, 0.2, 0.2, 0.2), 2: (0.6, 0.2, 0.1, 0.1), 3: (0.7, 0.2, 0.1)}


@cache
def class_objects() -> dict[str, tuple[int, ...]]:
    """Class -> positions of its objects in `load_art().objects`. Names are those of the folders, sorted."""
    objects: dict[str, list[int]] = {}
    for index, item in enumerate(load_art().objects):
        name = _CLASS_OF.get(item.category, item.category).replace(" ", "_")
        objects.setdefault(name, []).append(index)
    return {name: tuple(objects[name]) for name in sorted(objects)}


def emoji_prompts() -> dict[str, tuple[str, ...]]:
    """English prompts of each class from the names of its objects: "a picture of an owl", ...

    The emoji base has learnt from captions that name objects and never their category, so it cannot read the
    names of the classes, but it can read these.
    """
    objects = load_art().objects
    return {
        name: tuple(f"a picture of {objects[index].english[0]}" for index in members)
        for name, members in class_objects().items()
    }


def write_classes(folder: Path, split: str, per_class: int, seed: int = 0) -> Path:
    """Write 96x96 PNG pictures, `folder/<split>/<class>/00000.png` and so on, and return `folder/<split>`.

    Pictures that are there already and show the same are kept.

    Raises:
        DataError: unknown split, less than one picture a class, or a class folder with other pictures in it.
    """
    if split not in SPLITS:
        raise DataError(f"emoji classes have no split {split!r}; choose one of {', '.join(SPLITS)}")
    if per_class < 1:
        raise DataError(f"emoji classes need 1 or more pictures a class: got {per_class}")
    root = folder / split
    for name in class_objects():
        place = root / name
        with writing(place):
            place.mkdir(parents=True, exist_ok=True)
        files = [place / f"{index:05d}.png" for index in range(per_class)]
        others = set(place.glob("*.png")) - set(files)
        if others:
            raise DataError(f"{place}: holds other pictures ({min(others).name}); write to an empty folder")
        for index, path in enumerate(files):
            write_image(draw_class(name, split, index, seed), path)
    return root


def draw_class(name: str, split: str, index: int, seed: int = 0) -> Image.Image:
    """Picture `index` of a class, 96x96 RGB, whatever the number of pictures."""
    key = f"class/{seed}/{split}/{name}/{index}"
    return paint(class_scene(name, split, key), key)


def class_scene(name: str, split: str, key: str) -> Scene:
    """What the picture of a key shows: one to three kinds of objects of the class, in a split's style."""
    stream, art = Stream(f"scene/{key}"), load_art()
    left = list(class_objects()[name])
    kinds = 1 + stream.weighted(_KINDS)
    chosen = [left.pop(stream.below(len(left))) for _ in range(kinds)]
    styles = [i for i, style in enumerate(art.styles) if (style == TEST_STYLE) == (split == "test")]
    return arrange(stream, chosen, _COUNTS[kinds], styles)
