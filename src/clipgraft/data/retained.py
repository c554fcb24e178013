"""What a model is not to forget while it is trained: texts, pictures, and how much they count."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from clipgraft.data.args import TableArgs
from clipgraft.data.datasets import Pairs
from clipgraft.data.general_texts import general_texts
from clipgraft.data.reader import names_images, read_pairs, read_texts
from clipgraft.emoji.scenes import EmojiScenes
from clipgraft.errors import DataError
from clipgraft.models.clip import Clip
from clipgraft.progress import Progress

FEWEST = 20
"""Texts, of which a fifth are measured on: with fewer, one of them is a point of ten."""
_SCENES = 2_000
_SEED = 1_000_003  # of scenes that neither the base nor a demonstration was trained on
_MEASURED = 5  # one of so many texts is measured on


@dataclass(frozen=True)
class Retained:
    """Texts on which a trained model is to stay as its base is.

    Attributes:
        texts: distinct, of any language that the base knows.
        name: where they are from, in words.
        weight: how much their distance from the base counts beside the loss; `auto` tries several.
        pairs: pictures that hold an image tower that trains, with their captions, which are among the texts:
            how pictures compare with texts stays as the base has it. None for none.

    Raises:
        DataError: fewer than `FEWEST` texts.
    """

    texts: tuple[str, ...]
    name: str = "given texts"
    weight: float | Literal["auto"] = "auto"
    pairs: Pairs | None = None

    def __post_init__(self) -> None:
        distinct = tuple(dict.fromkeys(text for text in self.texts if text.strip()))
        object.__setattr__(self, "texts", distinct)
        if len(distinct) < FEWEST:
            raise DataError(
                f"{self.name}: {len(distinct)} different texts are too few to hold a model to; give {FEWEST} "
                "or more, or `retain=auto` for those that ship with clipgraft"
            )

    @property
    def digest(self) -> str:
        """The texts and their weight, for the record of a run that may be resumed."""
        pairs = () if self.pairs is None else ((str(image), *captions) for image, captions in self.pairs)
        told = "\n".join([*self.texts, str(self.weight), *("\n".join(pair) for pair in pairs)])
        return hashlib.sha256(told.encode(errors="surrogatepass")).hexdigest()[:16]

    def parts(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Split into texts to hold the model to, and texts to measure on; which is which no order decides."""
        ordered = sorted(self.texts, key=_mixed)
        measured = frozenset(ordered[: max(1, len(ordered) // _MEASURED)])
        held = tuple(text for text in self.texts if text not in measured)
        return held, tuple(text for text in self.texts if text in measured)


def _mixed(text: str) -> bytes:
    """Sort texts as if at random."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()


def retained_texts(clip: Clip, weight: float | Literal["auto"] = "auto") -> Retained:
    """Return the texts that ship for a base: captions like its own, else general ones.

    The embedded base was trained on English captions of emoji scenes; those of other scenes are like them.
    What other bases were trained on is not here: they take texts about everyday things.
    """
    if clip.source.name != "emoji":
        return Retained(general_texts(), "built-in English texts about everyday things", weight)
    scenes = EmojiScenes("train", _SCENES, _SEED)
    captions = tuple(text for index in range(_SCENES) for text in scenes.captions(index, "en"))
    return Retained(captions, "built-in English captions like those of the embedded base", weight)


def read_retained(
    source: str | Path,
    args: TableArgs | None = None,
    weight: float | Literal["auto"] = "auto",
    *,
    images: bool = False,
    progress: Progress = None,
) -> Retained:
    """Read the texts of a table, folder or text file.

    Args:
        source: the file or folder.
        args: which columns are read, and how the file is written.
        weight: as in `Retained`.
        images: whether to read the images beside them too, if it names any, which is of use where the image
            tower trains; otherwise they are not opened.
        progress: as in `read_pairs`.

    Raises:
        DataError: it cannot be read, or holds too few texts.
        ConfigError: an option is wrong.
    """
    texts = read_texts(source, args)
    pairs = read_pairs(source, args, progress=progress) if images and names_images(source, args) else None
    return Retained(texts, str(source), weight, pairs)
