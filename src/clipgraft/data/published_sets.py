"""The eleven sets that few-shot papers measure on, where CoOp's instructions put them.

https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md says what to download; nothing is shipped here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from clipgraft.data.class_splits import ClassSplits, Entry, gather_splits, read_shots, read_split
from clipgraft.data.datasets import Labelled
from clipgraft.data.image_files import is_image_name
from clipgraft.errors import ConfigError, DataError
from clipgraft.files import inside
from clipgraft.options import nearest
from clipgraft.readers import reading

_AGAIN = "follow CoOp's DATASETS.md again"


@dataclass(frozen=True)
class PublishedSet:
    """Where a set is below the root.

    Attributes:
        folder: of the set.
        images: folder below it that the paths of its split are relative to.
        split: the JSON file in it; empty where the set has a layout of its own.
        template: CoOp's prompt for its classes.
    """

    folder: str
    images: str
    split: str
    template: str = "a photo of a {}."


PUBLISHED_SETS: Mapping[str, PublishedSet] = {
    "imagenet": PublishedSet("imagenet", "images/train", ""),
    "caltech101": PublishedSet("caltech-101", "101_ObjectCategories", "split_zhou_Caltech101.json"),
    "oxford_pets": PublishedSet(
        "oxford_pets", "images", "split_zhou_OxfordPets.json", "a photo of a {}, a type of pet."
    ),
    "stanford_cars": PublishedSet("stanford_cars", "", "split_zhou_StanfordCars.json"),
    "oxford_flowers": PublishedSet(
        "oxford_flowers", "jpg", "split_zhou_OxfordFlowers.json", "a photo of a {}, a type of flower."
    ),
    "food101": PublishedSet(
        "food-101", "images", "split_zhou_Food101.json", "a photo of {}, a type of food."
    ),
    "fgvc_aircraft": PublishedSet("fgvc_aircraft", "images", "", "a photo of a {}, a type of aircraft."),
    "sun397": PublishedSet("sun397", "SUN397", "split_zhou_SUN397.json"),
    "dtd": PublishedSet("dtd", "images", "split_zhou_DescribableTextures.json", "{} texture."),
    "eurosat": PublishedSet(
        "eurosat", "2750", "split_zhou_EuroSAT.json", "a centered satellite photo of {}."
    ),
    "ucf101": PublishedSet(
        "ucf101", "UCF-101-midframes", "split_zhou_UCF101.json", "a photo of a person doing {}."
    ),
}


def find_set(name: str) -> PublishedSet:
    """Return a set by its name. Raises ConfigError, with the nearest names, where there is none."""
    found = PUBLISHED_SETS.get(name)
    if found is None:
        near = ", ".join(nearest(name, list(PUBLISHED_SETS)) or PUBLISHED_SETS)
        raise ConfigError(f"`dataset={name}`: there is no such set; did you mean {near}?")
    return found


def read_published(name: str, root: Path, *, strict: bool = False) -> ClassSplits:
    """Read the training and test images of a set.

    Args:
        name: of the set.
        root: the folder that holds the folders of all sets.
        strict: refuse absent images, instead of counting them.

    Raises:
        ConfigError: no such set.
        DataError: its folder or files are missing or damaged, or none of its images is there.
    """
    found = find_set(name)
    folder = root / found.folder
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder, where CoOp's DATASETS.md puts {name}")
    if name == "imagenet":
        return _read_imagenet(folder, strict)
    if name == "fgvc_aircraft":
        return _read_aircraft(folder, strict)
    return read_split(folder / found.split, folder / found.images, strict=strict)


def read_published_shots(
    name: str, root: Path, splits: ClassSplits, shots: Iterable[int], seeds: Sequence[int]
) -> dict[tuple[int, int], Labelled]:
    """Read the draws that 2SFS shares, by (shots, seed): those of `split_fewshot/` that are there.

    Raises:
        DataError: one of them is damaged, or names images that are absent or outside of the set.
    """
    found = find_set(name)
    folder = root / found.folder

    def find(path: str) -> Path:
        for part in (found.folder, found.images):
            path = path.removeprefix(f"{part}/")
        return inside(folder / found.images, path, folder / "split_fewshot", _AGAIN)

    files = {
        (count, seed): folder / "split_fewshot" / f"shot_{count}-seed_{seed}_train.jsonl"
        for count in shots
        for seed in seeds
    }
    return {draw: read_shots(path, find, splits) for draw, path in files.items() if path.is_file()}


def _read_imagenet(folder: Path, strict: bool) -> ClassSplits:
    """`classnames.txt` has "n01440764 tench" a line; folders of that name hold the images."""
    lines = _lines(folder / "classnames.txt")
    named = {label: line.partition(" ") for label, line in enumerate(sorted(lines))}
    names = {wnid: (label, name) for label, (wnid, _, name) in named.items()}
    train, test = (_images_of(folder / "images" / part, names) for part in ("train", "val"))
    return gather_splits(train, test, folder, strict=strict)


def _images_of(folder: Path, names: Mapping[str, tuple[int, str]]) -> list[Entry]:
    with reading(folder, DataError, _AGAIN):
        found = sorted(item.name for item in folder.iterdir() if item.is_dir())
    strange = [name for name in found if name not in names]
    if strange:
        raise DataError(f"{folder}: classnames.txt does not name {strange[0]}; {_AGAIN}")
    return [
        Entry(path, *names[name])
        for name in found
        for path in sorted((folder / name).iterdir())
        if is_image_name(path.name) and not path.name.startswith(".")
    ]


def _read_aircraft(folder: Path, strict: bool) -> ClassSplits:
    """`variants.txt` has a class a line; `images_variant_train.txt` "0034309 707-320" and so on."""
    labels = {name: label for label, name in enumerate(_lines(folder / "variants.txt"))}

    def entries(part: str) -> list[Entry]:
        path, found = folder / f"images_variant_{part}.txt", []
        for number, line in enumerate(_lines(path), start=1):
            image, _, name = line.partition(" ")
            if name not in labels:
                raise DataError(f"{path}, line {number}: {name[:60]!r} is not in variants.txt; {_AGAIN}")
            found.append(Entry(inside(folder / "images", f"{image}.jpg", path, _AGAIN), labels[name], name))
        return found

    return gather_splits(entries("train"), entries("test"), folder, strict=strict)


def _lines(path: Path) -> list[str]:
    with reading(path, DataError, _AGAIN):
        text = path.read_text(encoding="utf-8")
    return [line.strip() for line in text.splitlines() if line.strip()]
