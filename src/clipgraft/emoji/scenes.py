"""EmojiScenes: small pictures composed from open-licensed emoji, with five captions an image and language.

Everything follows from (seed, split, index): the same on every machine, in any order, for any size. The sets
of objects that occur together are disjoint between train, val and test. Art and its licences are in
`assets/emoji/art`.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from clipgraft.emoji.captions import LANGUAGES, describe
from clipgraft.emoji.drawing import SIDE, SPLITS, Scene, draw_scene, paint
from clipgraft.errors import DataError
from clipgraft.files import atomic_path
from clipgraft.writing import writing

__all__ = ["LANGUAGES", "EmojiScenes", "write_scenes"]
_PNG_HEAD = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + SIDE.to_bytes(4, "big") * 2


@dataclass(frozen=True)
class EmojiScenes:
    """One split of the data set; scene `i` does not depend on `size`.

    Attributes:
        split: "train", "val" or "test".
        size: how many scenes; any number.
        seed: another seed gives other scenes with the same split of combinations.

    Raises:
        DataError: unknown split, or a negative size.
    """

    split: str
    size: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise DataError(f"EmojiScenes has no split {self.split!r}; choose one of {', '.join(SPLITS)}")
        if self.size < 0:
            raise DataError(f"EmojiScenes cannot hold {self.size} scenes; give a size of 0 or more")

    def __len__(self) -> int:
        return self.size

    def scene(self, index: int) -> Scene:
        """What scene `index` shows.

        Raises:
            IndexError: `index` is not in 0..size-1.
        """
        return draw_scene(self._key(index), self.split)

    def image(self, index: int) -> Image.Image:
        """Scene `index` as a 96x96 RGB image."""
        return paint(self.scene(index), self._key(index))

    def captions(self, index: int, language: str = "en") -> tuple[str, ...]:
        """Five different captions of scene `index`.

        Raises:
            DataError: `language` is not in `LANGUAGES`.
        """
        _check_language(language)
        return describe(self.scene(index), self._key(index), language)

    def _key(self, index: int) -> str:
        if not 0 <= index < self.size:
            raise IndexError(f"scene {index} is outside 0..{self.size - 1} of split {self.split!r}")
        return f"{self.seed}/{self.split}/{index}"


def _check_language(language: str) -> None:
    if language not in LANGUAGES:
        raise DataError(f"EmojiScenes has no language {language!r}; choose one of {', '.join(LANGUAGES)}")


def write_scenes(
    folder: Path, split: str, size: int, languages: Sequence[str], seed: int = 0
) -> dict[str, Path]:
    """Write scenes as files: PNG images and one CSV a language.

    `folder/images/<split>_00000.png` and `folder/<split>.<language>.csv` with the columns image (relative to
    `folder`) and caption, five rows an image. Images that are there already and show the same are kept.

    Returns:
        language -> path of its CSV.

    Raises:
        DataError: unknown split or language, a negative size, or other files under these names.
    """
    scenes = EmojiScenes(split, size, seed)
    for language in languages:
        _check_language(language)
    with writing(folder / "images"):
        (folder / "images").mkdir(parents=True, exist_ok=True)
    names = [f"images/{split}_{i:05d}.png" for i in range(size)]
    for i, name in enumerate(names):
        write_image(scenes.image(i), folder / name)
    tables = {}
    for language in languages:
        rows = [(name, caption) for i, name in enumerate(names) for caption in scenes.captions(i, language)]
        tables[language] = folder / f"{split}.{language}.csv"
        _write_table(rows, tables[language])
    return tables


def write_image(image: Image.Image, path: Path) -> None:
    """Write a PNG whole, unless the file is there already and shows the same.

    Raises:
        DataError: something else is there than a picture of ours, be it of another seed or cut short.
    """
    if _same(path, image):
        return
    if path.is_file() and not _replaceable(path):
        raise DataError(f"{path}: is no picture of ours and is left as it is; write to an empty folder")
    part = path.with_suffix(".part")
    try:
        with writing(path):
            image.save(part, format="PNG", compress_level=1)
            part.replace(path)
    except BaseException:  # Ctrl-C among them
        part.unlink(missing_ok=True)
        raise


def _same(path: Path, image: Image.Image) -> bool:
    # A file cut short by a kill, or left by another seed, must not be taken for the wanted image.
    if not path.is_file():
        return False
    try:
        with Image.open(path) as found:
            return found.size == (SIDE, SIDE) and found.convert("RGB").tobytes() == image.tobytes()
    except (OSError, SyntaxError):
        return False


def _replaceable(path: Path) -> bool:
    """Whether a file is empty, a PNG of our size, or the beginning of one."""
    with path.open("rb") as file:
        head = file.read(len(_PNG_HEAD))
    return _PNG_HEAD.startswith(head)


def _write_table(rows: Sequence[tuple[str, str]], path: Path) -> None:
    if path.is_file():
        with path.open("rb") as found:
            if found.readline(100).strip() not in (b"image,caption", b""):
                raise DataError(f"{path}: is no table of ours and is left as it is; write to an empty folder")
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "caption"))
        writer.writerows(rows)
