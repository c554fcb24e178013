"""Images with classes: how they are divided, and how classes are weighed."""

from __future__ import annotations

import logging
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipgraft.data.datasets import Labelled, class_weights, few_shot, match_classes, split_labelled
from clipgraft.errors import ConfigError, DataError


def message(error: pytest.ExceptionInfo[Exception]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def pairs(data: Labelled) -> list[tuple[Path, int]]:
    return list(zip(data.images, data.labels, strict=True))


def test_labels_must_fit() -> None:
    """A wrong label of a hand-made data set would fail deep inside training."""
    with pytest.raises(DataError, match="2 images and 1 labels"):
        Labelled((Path("a"), Path("b")), (0,), ("x", "y"))
    with pytest.raises(DataError, match=r"label 2 is outside 0\.\.1"):
        Labelled((Path("a"),), (2,), ("x", "y"))


@st.composite
def datasets(draw_from: st.DrawFn) -> Labelled:
    sizes = draw_from(st.lists(st.integers(0, 12), min_size=2, max_size=6))
    files = [(Path(f"/data/{c}/{i}.png"), c) for c, size in enumerate(sizes) for i in range(size)]
    files = draw_from(st.permutations(files))
    names = tuple(f"class {c}" for c in range(len(sizes)))
    return Labelled(tuple(path for path, _ in files), tuple(c for _, c in files), names)


@given(datasets(), st.floats(0.05, 0.95), st.integers(0, 99), st.randoms(use_true_random=False))
def test_a_split_divides_each_class_alike(data: Labelled, size: float, seed: int, chance: object) -> None:
    """Validation images would be trained on, a class be in one part alone, or a rerun divide otherwise."""
    if max(data.counts()) < 2:
        with pytest.raises(DataError, match="nothing can be held out"):
            split_labelled(data, size, seed)
        return
    train, val = split_labelled(data, size, seed)
    assert train.classes == val.classes == data.classes
    assert Counter(pairs(train)) + Counter(pairs(val)) == Counter(pairs(data))
    for n, kept, held in zip(data.counts(), train.counts(), val.counts(), strict=True):
        if n >= 2:
            assert min(kept, held) >= 1
            assert abs(held - n * size) <= max(0.5, 1 - n * size, n * size - (n - 1)) + 1e-9
        else:
            assert (kept, held) == (n, 0)
    assert split_labelled(shuffled(data, chance), size, seed) == (train, val)


def shuffled(data: Labelled, chance: object) -> Labelled:
    order = pairs(data)
    chance.shuffle(order)  # type: ignore[attr-defined]
    return Labelled(tuple(path for path, _ in order), tuple(label for _, label in order), data.classes)


@given(datasets(), st.integers(1, 13), st.integers(0, 99), st.randoms(use_true_random=False))
def test_few_shots_of_each_class(data: Labelled, shots: int, seed: int, chance: object) -> None:
    """A 4-shot result would be of 5 shots, of one class more than others, or of other images each time."""
    few = few_shot(data, shots, seed)
    assert few.classes == data.classes
    assert few.counts() == tuple(min(n, shots) for n in data.counts())
    assert set(pairs(few)) <= set(pairs(data))
    assert few_shot(shuffled(data, chance), shots, seed) == few
    assert set(pairs(few)) <= set(pairs(few_shot(data, shots + 1, seed)))


def many(root: str = "/data") -> Labelled:
    files = [(Path(f"{root}/{c}/{i}.png"), c) for c in range(2) for i in range(40)]
    return Labelled(tuple(path for path, _ in files), tuple(c for _, c in files), ("a", "b"))


def test_the_seed_decides_and_the_place_does_not() -> None:
    """Two people with the same data and seed would validate on other images; or all seeds on the same."""
    here, there = split_labelled(many("/here"), 0.25, 1)[1], split_labelled(many("/mnt/there"), 0.25, 1)[1]
    assert [p.relative_to("/here") for p in here.images] == [
        p.relative_to("/mnt/there") for p in there.images
    ]
    assert split_labelled(many(), 0.25, 1) != split_labelled(many(), 0.25, 2)
    assert few_shot(many(), 5, 1) != few_shot(many(), 5, 2)


def test_a_split_takes_no_regular_pattern() -> None:
    """Every k-th image held out would follow whatever order the files were named in."""
    _, val = split_labelled(many(), 0.5, 0)
    chosen = sorted(int(path.stem) for path, label in pairs(val) if label == 0)
    assert len({b - a for a, b in pairwise(chosen)}) > 2


def test_small_classes_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    """A class that is never validated, or has too few shots, would go unnoticed."""
    data = Labelled(tuple(map(Path, "abcd")), (0, 1, 1, 1), ("rare", "usual"))
    with caplog.at_level(logging.WARNING, logger="clipgraft"):
        split_labelled(data, 0.3, 0)
        few_shot(data, 2, 0)
    assert [record.getMessage() for record in caplog.records] == [
        "1 class with one image, all for training, none to validate on: rare",
        "1 class with fewer than 2 images: rare (1)",
    ]


@pytest.mark.parametrize("size", [0, 1, -0.1, 1.5])
def test_a_validation_share_must_be_one(size: float) -> None:
    """`val_size` 10 for 10 % would hold out everything."""
    with pytest.raises(ConfigError, match="`val_size`"):
        split_labelled(many(), size, 0)
    with pytest.raises(ConfigError, match="`shots`"):
        few_shot(many(), 0, 0)


def test_validation_data_takes_the_classes_of_training(caplog: pytest.LogCaptureFixture) -> None:
    """With a class absent, every later label would be off by one, and accuracy near zero."""
    val = Labelled((Path("a"), Path("b")), (1, 0), ("cat", "yak"))
    with caplog.at_level(logging.WARNING, logger="clipgraft"):
        same = match_classes(val, ("cat", "dog", "yak"))
    assert [same.classes[label] for label in same.labels] == ["yak", "cat"]
    assert caplog.messages == ["1 class without an image in the validation data: dog"]
    with pytest.raises(DataError) as error:
        match_classes(val, ("cat", "yack"))
    assert "1 class unknown to the model: 'yak' (did you mean 'yack'?)" in message(error)


@given(datasets())
def test_weights_balance_classes(data: Labelled) -> None:
    """Rare classes would still be drowned, or the learning rate change with the weights."""
    if not len(data):
        return
    weights = class_weights(data)
    totals = [w * n for w, n in zip(weights, data.counts(), strict=True) if n]
    assert totals == pytest.approx([totals[0]] * len(totals))
    assert sum(weights[label] for label in data.labels) / len(data) == pytest.approx(1)
    assert all(w == 0 for w, n in zip(weights, data.counts(), strict=True) if not n)
