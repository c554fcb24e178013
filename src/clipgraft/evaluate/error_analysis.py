"""Find where retrieval fails: the worst captions with the nearest wrong image, and recall by length and word.

Captions are the queries. Where a model is measured beside another, both answer the same captions, and those
that got better and worse are listed as well.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from clipgraft.data.args import FeatureArgs
from clipgraft.data.datasets import Pairs
from clipgraft.data.features import encode_captions
from clipgraft.engine.encoder import Encoder
from clipgraft.evaluate.answers import ImageAnswers, image_answers
from clipgraft.evaluate.compare import each_model
from clipgraft.evaluate.ranks import retrieval_ranks
from clipgraft.models.clip import Clip, ClipLike, as_clip
from clipgraft.models.device import use_autocast
from clipgraft.notebook_tables import Picture, Tabled, small_pictures
from clipgraft.pictures import jpeg_thumbnail
from clipgraft.records import Finite, Rank, Whole
from clipgraft.results import Result
from clipgraft.text_tables import Column, Table, count, share, table_of

WORST, CHANGED = 12, 8  # captions that are listed
LENGTHS, WORDS = 5, 10  # groups by length; words with the lowest recall, and as many with the highest
LEAST = 10  # captions with a word: of fewer, its recall says little


@dataclass(frozen=True)
class Answer:
    """What a model answers for a caption.

    Attributes:
        rank: of the caption's image, from 1.
        similarity: cosine of the caption and its image.
        wrong: file of the nearest image that is not the caption's.
        wrong_similarity: cosine of the caption and that image.
    """

    rank: Rank
    similarity: Finite
    wrong: str
    wrong_similarity: Finite


@dataclass(frozen=True)
class Asked:
    """A caption, the file of its image, and the answer of each model by its name."""

    caption: str
    image: str
    answers: Mapping[str, Answer]


@dataclass(frozen=True)
class AskedCaptions(Tabled):
    """The first of `total` captions in some order, of each image one."""

    title: str
    total: Whole
    listed: tuple[Asked, ...]

    def table(self) -> Table:
        """A row for each caption: its rank, its similarity to its image, and to the nearest wrong one."""
        names = list(self.listed[0].answers) if self.listed else []
        columns = [Column("caption", left=True), Column("image", _file_name, left=True)]
        for name in names:
            columns += [Column(f"rank, {name}", count), Column(f"similarity, {name}", _three_digits)]
            columns += [
                Column(f"wrong, {name}", _file_name, left=True),
                Column(f"wrong similarity, {name}", _three_digits),
            ]
        rows = ([a.caption, a.image, *(v for n in names for v in _values(a.answers[n]))] for a in self.listed)
        return table_of(f"{self.title}: {len(self.listed):,} of {self.total:,}", columns, rows)

    def pictures(self) -> Mapping[str, Sequence[Picture]]:
        """The right image of each caption, and the nearest wrong one of each model."""
        names = list(self.listed[0].answers) if self.listed else []
        files = {"right": [asked.image for asked in self.listed]}
        files |= {f"wrong, {name}": [asked.answers[name].wrong for asked in self.listed] for name in names}
        every = [(file, f"{kind} image") for kind, column in files.items() for file in column]
        made, size = small_pictures(every, jpeg_thumbnail), len(self.listed)
        return {kind: made[n * size : (n + 1) * size] for n, kind in enumerate(files)}


@dataclass(frozen=True)
class RecallGroup:
    """Captions that have something in common.

    Attributes:
        name: what that is.
        captions: how many there are.
        first: by model, for how many of them the right image came first.
    """

    name: str
    captions: Whole
    first: Mapping[str, Whole]


@dataclass(frozen=True)
class RecallGroups(Tabled):
    """R@1 by groups of captions; `note` says which groups there are."""

    title: str
    groups: tuple[RecallGroup, ...]
    note: str = ""

    def table(self) -> Table:
        """A row for each group, with its size and the R@1 of each model."""
        names = list(self.groups[0].first) if self.groups else []
        columns = [Column(self.title, left=True), Column("captions", count)]
        columns += [Column(f"R@1, {name}", share) for name in names]
        rows = ([g.name, g.captions, *(g.first[n] / g.captions for n in names)] for g in self.groups)
        return table_of("", columns, rows, self.note)


@dataclass(frozen=True, repr=False)
class RetrievalErrors(Result):
    """Where retrieval of images by captions fails.

    Attributes:
        captions: how many were asked.
        first: by model, for how many of them the right image came first.
        worst: those with the lowest place of the right image under the last model.
        better, worse: those whose right image has a higher or lower place under the last model than under the
            first, the largest ratio first; without a second model there are none.
        by_length: R@1 by the number of words.
        by_word: R@1 of captions with a word, the lowest first.
    """

    _shows: ClassVar[tuple[str, ...]] = ("captions", "first")

    captions: Whole
    first: Mapping[str, Whole]
    worst: AskedCaptions
    better: AskedCaptions
    worse: AskedCaptions
    by_length: RecallGroups
    by_word: RecallGroups

    def table(self) -> Table:
        """The worst captions."""
        return self.worst.table()

    def _repr_html_(self) -> str:
        parts = (self.worst, self.better, self.worse, self.by_length, self.by_word)
        return "".join(part._repr_html_() for part in parts)


def retrieval_errors(
    model: ClipLike,
    pairs: Pairs,
    features: FeatureArgs | None = None,
    *,
    batch_size: int = 64,
    least: int = LEAST,
    **options: Any,
) -> RetrievalErrors:
    """Find the captions whose image a model places lowest, and which lengths and words do worst.

    An adapter is measured beside its base.

    Args:
        model: a `Clip` or a raw model.
        pairs: two images or more, with one or many captions each.
        features: how images become features, and where those are kept, unless LoRA acts on the image tower.
        batch_size: images encoded at once.
        least: captions that a word must be in to be listed.
        **options: single fields of `FeatureArgs`, such as `workers=0`, in place of those of `features`.

    Raises:
        DataError: there is only one image.
    """
    clip = as_clip(model)
    features = (features or FeatureArgs()).replace(**options)
    rows = pairs.rows()
    owner = torch.tensor([image for image, _ in rows])

    def answer(clip: Clip, images: Tensor) -> ImageAnswers:
        encoder = Encoder(clip, use_autocast(features.autocast, clip.device))
        texts = encode_captions(clip, [caption for _, caption in rows], encoder=encoder)
        return image_answers(images, texts, owner, retrieval_ranks(images, texts, owner))

    answers = each_model({"base": clip}, pairs.images, features, batch_size, answer)
    return analyse_errors(pairs, answers, least)


def analyse_errors(pairs: Pairs, answers: Mapping[str, ImageAnswers], least: int = LEAST) -> RetrievalErrors:
    """Turn what models answer for all captions of `pairs`, in their order, into lists and groups."""
    rows = pairs.rows()
    captions = [caption for _, caption in rows]
    hits = {name: (found.rank == 1).tolist() for name, found in answers.items()}
    sides = list(answers.values())
    before, after = sides[0], sides[-1]
    owner = [image for image, _ in rows]

    def listed(title: str, found: Sequence[int], most: int) -> AskedCaptions:
        of_image: dict[int, int] = {}
        for row in found:
            of_image.setdefault(owner[row], row)
        chosen = list(of_image.values())[:most]
        return AskedCaptions(title, len(found), tuple(_asked(pairs, rows, answers, row) for row in chosen))

    margin = (after.own - after.score).tolist()
    wrong = [row for row in range(len(rows)) if after.rank[row] > 1]
    worst = sorted(wrong, key=lambda row: (-int(after.rank[row]), margin[row]))
    ratio = (before.rank / after.rank).tolist()
    better = sorted((r for r in range(len(rows)) if ratio[r] > 1), key=lambda r: (-ratio[r], -margin[r]))
    worse = sorted((r for r in range(len(rows)) if ratio[r] < 1), key=lambda r: (ratio[r], margin[r]))
    return RetrievalErrors(
        captions=len(rows),
        first={name: sum(found) for name, found in hits.items()},
        worst=listed("worst captions", worst, WORST),
        better=listed("better than before", better, CHANGED),
        worse=listed("worse than before", worse, CHANGED),
        by_length=_by_length(captions, hits),
        by_word=_by_word(captions, hits, least),
    )


def _asked(
    pairs: Pairs, rows: Sequence[tuple[int, str]], answers: Mapping[str, ImageAnswers], row: int
) -> Asked:
    image, caption = rows[row]
    found = {
        name: Answer(
            rank=int(each.rank[row]),
            similarity=round(float(each.own[row]), 4),
            wrong=str(pairs.images[int(each.nearest[row])].absolute()),
            wrong_similarity=round(float(each.score[row]), 4),
        )
        for name, each in answers.items()
    }
    return Asked(caption, str(pairs.images[image].absolute()), found)


def _by_length(captions: Sequence[str], hits: Mapping[str, Sequence[bool]]) -> RecallGroups:
    """Groups of about the same number of captions, as far as captions of one length stay together."""
    lengths = [len(caption.split()) for caption in captions]
    ordered = sorted(lengths)
    starts = sorted({ordered[len(ordered) * group // LENGTHS] for group in range(LENGTHS)})
    groups = []
    for start, end in pairwise([*starts, ordered[-1] + 1]):
        members = [row for row, length in enumerate(lengths) if start <= length < end]
        name = f"{start}" if start == end - 1 else f"{start} to {end - 1}"
        groups.append(_group(name, members, hits))
    return RecallGroups("words", tuple(groups))


def _by_word(captions: Sequence[str], hits: Mapping[str, Sequence[bool]], least: int) -> RecallGroups:
    """The words of the lowest and of the highest R@1 under the last model, among those that are not rare."""
    words = [set(filter(None, map(bare_word, caption.split()))) for caption in captions]
    times = Counter(word for found in words for word in found)
    members: dict[str, list[int]] = {word: [] for word, number in times.items() if number >= least}
    for row, found in enumerate(words):
        for word in found & members.keys():
            members[word].append(row)
    groups = [_group(word, rows, hits) for word, rows in members.items()]
    last = list(hits)[-1]
    groups.sort(key=lambda group: (group.first[last] / group.captions, -group.captions, group.name))
    shown = groups if len(groups) <= 2 * WORDS else [*groups[:WORDS], *groups[-WORDS:]]
    note = f"{len(groups):,} words are in {least:,} captions or more"
    note += (
        "."
        if shown is groups
        else f"; the {WORDS} of the lowest and the {WORDS} of the highest R@1 are shown."
    )
    return RecallGroups("word", tuple(shown), note)


def bare_word(word: str) -> str:
    """A word without marks around it, in small letters, composed: `“Café,` -> `café`."""
    word = unicodedata.normalize("NFC", word).casefold()
    kept = [place for place, letter in enumerate(word) if unicodedata.category(letter)[0] not in "PS"]
    return word[kept[0] : kept[-1] + 1] if kept else ""


def _group(name: str, rows: Sequence[int], hits: Mapping[str, Sequence[bool]]) -> RecallGroup:
    first = {model: sum(found[row] for row in rows) for model, found in hits.items()}
    return RecallGroup(name, len(rows), first)


def _values(answer: Answer) -> tuple[Any, ...]:
    return answer.rank, answer.similarity, answer.wrong, answer.wrong_similarity


def _file_name(path: str) -> str:
    return Path(path).name


def _three_digits(number: float) -> str:
    return f"{number:.3f}"
