"""Runs that cannot learn say so, before training or after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import clipgraft as cg
from clipgraft.models.clip import Clip
from clipgraft.train.verdict import nothing_learnt
from fitting import groups


def train(clip: Clip, pairs: cg.Pairs, out: Path, **options: Any) -> cg.train.FitResult:
    cg.apply_lora(clip, r=2)
    settings: dict[str, Any] = {"batch_size": 2, "epochs": 1, "workers": 0, "progress": False, **options}
    return cg.fit(clip, pairs, **groups(out=out, **settings))


@pytest.mark.parametrize(
    ("images", "captions", "told"),
    [
        ("abcd", ["the same"], "all 4 captions are the same, 'the same'"),
        ("aaaa", ["one", "two", "three", "four"], "all 4 captions are of one image, "),
    ],
)
def test_pairs_without_contrast_are_refused(
    images: str, captions: list[str], told: str, clip: Clip, pairs: cg.Pairs, tmp_path: Path
) -> None:
    """The loss is 0.0 at every step, and an adapter that has learnt nothing is saved without a word."""
    files = {letter: pairs.images[number] for number, letter in enumerate("abcd")}
    texts = captions * (len(images) // len(captions))
    same = cg.Pairs(tuple(files[letter] for letter in images), tuple((text,) for text in texts))
    with pytest.raises(cg.errors.DataError, match=f"nothing to learn: {told}"):
        train(clip, same, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_copies_of_one_image_are_refused(clip: Clip, pairs: cg.Pairs, tmp_path: Path) -> None:
    """Under other names, one picture tells no captions apart."""
    files = [tmp_path / f"{number}.png" for number in range(4)]
    for file in files:
        file.write_bytes(pairs.images[0].read_bytes())
    copies = cg.Pairs(tuple(files), tuple((f"text {number}",) for number in range(4)))
    with pytest.raises(cg.errors.DataError, match="the same features for all 4 images"):
        train(clip, copies, tmp_path / "run")


def test_one_class_is_refused(clip: Clip, pairs: cg.Pairs, tmp_path: Path) -> None:
    """Any classifier is right about one class."""
    one = cg.Labelled(pairs.images[:4], (0, 0, 0, 0), ("cat",))
    cg.apply_lora(clip, r=2)
    with pytest.raises(cg.errors.DataError, match="all 4 images are of one class, 'cat'"):
        cg.fit_classifier(clip, one, **groups(prompts=[["a cat"]], out=tmp_path / "run", batch_size=2))


def test_captions_that_look_like_classes_are_named(
    clip: Clip, pairs: cg.Pairs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two captions for all images train far better as classes."""
    many = tuple((("a cat", "a dog")[number % 2],) * 4 for number in range(12))
    train(clip, cg.Pairs(pairs.images, many), tmp_path / "run", batch_size=8)
    assert "48 pairs have only 2 different captions" in caplog.text
    assert "`fit_classifier` learns more" in caplog.text


@pytest.mark.parametrize(
    ("losses", "told"),
    [
        ([0.0, 0.0], "the loss was 0.0 at every step"),
        ([2.079, 2.079, 2.079], "the loss was 2.0790 at every step"),
        ([2.1, 2.3, 2.3, 2.1], "2.2000 in the first epoch and 2.2000 in the last; raise `lr`"),
        ([2.1, 2.3, 2.2, 2.1], None),
        ([2.1, 2.3], None),
        ([], None),
    ],
)
def test_losses_that_show_it(losses: list[float], told: str | None) -> None:
    """Where the data look fine, the loss may still say that nothing was learnt."""
    found = nothing_learnt(losses, 2)
    assert found is None if told is None else told in str(found)


def test_it_is_said_at_the_end(
    clip: Clip, pairs: cg.Pairs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A learning rate that moves nothing ends in "saved" alone."""
    train(clip, pairs, tmp_path / "run", batch_size=24, epochs=2, lr=1e-12)
    assert "nothing was learnt: the mean loss was" in caplog.text
