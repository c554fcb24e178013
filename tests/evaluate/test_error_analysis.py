"""Worst captions and recall by group, against plain loops over all similarities."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import clipgraft as cg
from clipgraft.errors import DataError
from clipgraft.evaluate.answers import ImageAnswers, image_answers
from clipgraft.evaluate.error_analysis import RetrievalErrors, analyse_errors, bare_word
from clipgraft.evaluate.ranks import retrieval_ranks

WORDS = ("red", "Green,", "blue.", "“cat”", "dog", "on", "under", "tree")
IMAGES = 40
OWNER = torch.arange(IMAGES).repeat_interleave(3)


def pairs() -> cg.Pairs:
    """Forty images with three captions of one to six words each."""
    noise = torch.Generator().manual_seed(0)
    captions = []
    for _ in range(3 * IMAGES):
        length = int(torch.randint(1, 7, (), generator=noise))
        captions.append(" ".join(WORDS[int(w)] for w in torch.randint(0, 8, (length,), generator=noise)))
    files = tuple(Path(f"/{image}.png") for image in range(IMAGES))
    return cg.Pairs(files, tuple(tuple(captions[3 * i : 3 * i + 3]) for i in range(IMAGES)))


def features(seed: int, like: float) -> tuple[Tensor, Tensor]:
    """Images, and captions that are more or less like them."""
    noise = torch.Generator().manual_seed(seed)
    images = F.normalize(torch.randn(IMAGES, 16, generator=noise), dim=1)
    texts = like * images[OWNER] + torch.randn(3 * IMAGES, 16, generator=noise) / 4
    return images, F.normalize(texts, dim=1)


MODELS = {"base": features(1, 0.3), "adapted": features(2, 0.8)}


def answers() -> dict[str, ImageAnswers]:
    """Of both models."""
    return {n: image_answers(*f, OWNER, retrieval_ranks(*f, OWNER)) for n, f in MODELS.items()}


@pytest.fixture(scope="module")
def errors() -> RetrievalErrors:
    """Of both models; words in five captions or more."""
    return analyse_errors(pairs(), answers(), least=5)


def plain_ranks(name: str) -> list[int]:
    """The place of the right image of every caption, by sorting."""
    images, texts = MODELS[name]
    orders = (texts.double() @ images.double().T).argsort(1, descending=True)
    return [1 + order.tolist().index(owner) for order, owner in zip(orders, OWNER.tolist(), strict=True)]


def test_the_worst_are_the_worst(errors: RetrievalErrors) -> None:
    """A caption that is found well is listed, or the nearest wrong image is another one."""
    rows, ranks = pairs().rows(), plain_ranks("adapted")
    assert errors.worst.total == sum(rank > 1 for rank in ranks)
    listed = [asked.answers["adapted"].rank for asked in errors.worst.listed]
    worst_of_image = [max(ranks[3 * i : 3 * i + 3]) for i in range(IMAGES)]
    assert listed == sorted(worst_of_image, reverse=True)[: len(listed)]
    for part in (errors.worst, errors.better, errors.worse):
        assert len({asked.image for asked in part.listed}) == len(part.listed) > 0
    for asked in (*errors.worst.listed, *errors.better.listed, *errors.worse.listed):
        row = rows.index((int(Path(asked.image).stem), asked.caption))
        for name, (images, texts) in MODELS.items():
            similar = {i: float(texts[row] @ images[i]) for i in range(IMAGES)}
            own, answer = similar.pop(int(Path(asked.image).stem)), asked.answers[name]
            wrong = max(similar, key=lambda image: similar[image])
            assert answer.rank == plain_ranks(name)[row]
            assert Path(answer.wrong).stem == str(wrong)
            assert (answer.similarity, answer.wrong_similarity) == pytest.approx(
                (own, similar[wrong]), abs=1e-4
            )


def test_better_and_worse_are_counted(errors: RetrievalErrors) -> None:
    """What got worse is listed under better, or some captions are counted nowhere."""
    before, after = plain_ranks("base"), plain_ranks("adapted")
    assert errors.better.total == sum(b > a for b, a in zip(before, after, strict=True))
    assert errors.worse.total == sum(b < a for b, a in zip(before, after, strict=True))
    ratios = [each.answers["base"].rank / each.answers["adapted"].rank for each in errors.better.listed]
    assert ratios == sorted(ratios, reverse=True)
    assert min(ratios) > 1
    assert all(each.answers["base"].rank < each.answers["adapted"].rank for each in errors.worse.listed)


def test_groups_add_up(errors: RetrievalErrors) -> None:
    """Groups by length leave captions out, so that their recalls do not make up the whole's."""
    images, texts = MODELS["adapted"]
    whole = cg.evaluate.retrieval_metrics(images, texts, OWNER)["text_to_image_R@1"]
    assert sum(group.captions for group in errors.by_length.groups) == errors.captions == 3 * IMAGES
    for name in MODELS:
        assert sum(group.first[name] for group in errors.by_length.groups) == errors.first[name]
    frame = errors.by_length.to_pandas()
    mean = (frame["captions"] * frame["R@1, adapted"]).sum() / frame["captions"].sum()
    assert mean == pytest.approx(whole)


def test_words_are_those_of_the_captions(errors: RetrievalErrors) -> None:
    """`Cat,` and `cat` are two words, a word counts twice in a caption, or a rare one is listed."""
    captions, ranks = [text for _, text in pairs().rows()], plain_ranks("adapted")
    for group in errors.by_word.groups:
        having = [r for r, text in zip(ranks, captions, strict=True) if group.name in text.lower()]
        assert (group.captions, group.first["adapted"]) == (len(having), sum(rank == 1 for rank in having))
    assert {group.name for group in errors.by_word.groups} == {bare_word(word) for word in WORDS}
    assert [bare_word(word) for word in ("“Café,”", "--", "don't", "CAFE\u0301")] == [
        "café",
        "",
        "don't",
        "café",
    ]
    assert analyse_errors(pairs(), answers(), least=1_000).by_word.groups == ()


def test_one_model_has_nothing_to_be_compared_with() -> None:
    """A base alone is listed as better than itself."""
    alone = analyse_errors(pairs(), {"base": answers()["base"]})
    assert (alone.better.total, alone.worse.total) == (0, 0)
    assert "worst captions" in alone._repr_html_()
    with pytest.raises(DataError, match="one image has no wrong ones"):
        image_answers(
            torch.eye(1),
            torch.eye(1),
            torch.tensor([0]),
            retrieval_ranks(torch.eye(1), torch.eye(1), torch.tensor([0])),
        )
