"""Emoji pictures with classes: the same everywhere, of one class each, with a style kept for the test."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipgraft.data.prompts import class_prompts
from clipgraft.data.reader import read_labelled
from clipgraft.emoji.art import load_art, sprite
from clipgraft.emoji.classes import (
    TEST_STYLE,
    class_objects,
    class_scene,
    draw_class,
    emoji_prompts,
    write_classes,
)
from clipgraft.errors import DataError


def test_classes_divide_the_art() -> None:
    """An object would belong to two classes, or a class be a single object that retrieval already knows."""
    classes = class_objects()
    members = [index for objects in classes.values() for index in objects]
    assert sorted(members) == list(range(len(load_art().objects)))
    assert len(classes) >= 15
    assert min(map(len, classes.values())) >= 6
    assert list(classes) == sorted(classes)


def test_every_object_is_of_the_class_and_every_one_is_shown() -> None:
    """A picture of a class would also show another, or an object of the class never appear."""
    for name, members in class_objects().items():
        shown: set[int] = set()
        for i in range(200):
            groups = class_scene(name, "train", f"{name}{i}").groups
            indices = [group.index for group in groups]
            assert len(set(indices)) == len(indices)
            shown.update(indices)
        assert shown == set(members)


def test_the_test_style_is_never_trained_on() -> None:
    """The test split would measure what was trained on."""
    names = load_art().styles
    styles = {
        split: {names[class_scene("bird", split, str(i)).style] for i in range(60)}
        for split in ("train", "val", "test")
    }
    assert styles["test"] == {TEST_STYLE}
    assert styles["train"] == styles["val"] == set(names) - {TEST_STYLE}


def test_the_test_style_is_what_is_painted() -> None:
    """A test picture would be drawn in a training style whatever its scene says."""
    style = load_art().styles.index(TEST_STYLE)
    for index in range(400):
        key = f"class/0/test/bird/{index}"
        scene = class_scene("bird", "test", key)
        if len(scene.groups) == 1 and scene.groups[0].count == 1:
            picture = np.asarray(draw_class("bird", "test", index)).astype(int)
            errors = [best_match(picture, scene.groups[0].index, s) for s in range(3)]
            assert int(np.argmin(errors)) == style
            assert min(errors) == 0
            return
    raise AssertionError("no picture of a single object")


def best_match(picture: np.ndarray, index: int, style: int) -> float:
    """The least mean difference of a sprite to any place near the middle, over its opaque pixels."""
    found = []
    for size in (57, 64):
        places = range((96 - size) // 2 - 3, (96 - size) // 2 + 4)
        for angle in (-8, 0, 8):
            drawn = np.asarray(sprite(style, index, size, angle)).astype(int)
            opaque = drawn[..., 3] == 255
            for y, x in itertools.product(places, places):
                patch = picture[y : y + size, x : x + size]
                found.append(np.abs(patch - drawn[..., :3])[opaque].mean())
    return float(min(found))


def test_pictures_do_not_depend_on_how_many() -> None:
    """Two people with the same seed would tune on different pictures."""
    assert draw_class("bird", "val", 3).tobytes() == draw_class("bird", "val", 3).tobytes()
    pictures = {
        draw_class(name, split, i, seed).tobytes()
        for name in ("bird", "fruit")
        for split in ("train", "val", "test")
        for seed in (0, 1)
        for i in range(4)
    }
    assert len(pictures) == 48


def test_what_a_picture_shows_is_fixed_for_ever() -> None:
    """Every published number would belong to other pictures than the package makes."""
    scene = class_scene("bird", "test", "class/0/test/bird/0")
    objects = load_art().objects
    shown = [(objects[group.index].english[0], group.count) for group in scene.groups]
    assert shown == [("a rooster", 1), ("a baby chick", 1)]
    assert (scene.layout, scene.colour, scene.pattern) == ("column", "white", "plain")


def test_written_folders_are_read_as_classes(tmp_path: Path) -> None:
    """What is written would not be a data set that `read_labelled` takes."""
    root = write_classes(tmp_path, "val", 2)
    assert root == tmp_path / "val"
    data = read_labelled(root)
    report = data.report
    assert data.classes == tuple(class_objects())
    assert set(data.counts()) == {2}
    assert (report.bad_rows, report.duplicate_images) == (0, 0)
    first = data.images[data.labels.index(data.classes.index("bird"))]
    with Image.open(first) as image:
        assert image.convert("RGB").tobytes() == draw_class("bird", "val", 0).tobytes()


def test_writing_again_keeps_and_repairs(tmp_path: Path) -> None:
    """A second run would draw everything anew, or keep a picture that was cut short."""
    root = write_classes(tmp_path, "test", 1)
    kept, broken = root / "bird/00000.png", root / "fruit/00000.png"
    before = kept.stat().st_ino
    whole = broken.read_bytes()
    broken.write_bytes(whole[:50])
    write_classes(tmp_path, "test", 1)
    assert kept.stat().st_ino == before
    assert broken.read_bytes() == whole


def test_pictures_of_a_larger_run_are_not_mixed_in(tmp_path: Path) -> None:
    """Five pictures a class would be asked for, and ten be trained on."""
    write_classes(tmp_path, "train", 2)
    with pytest.raises(DataError, match=r"00001\.png"):
        write_classes(tmp_path, "train", 1)


def test_pictures_of_a_user_stay(tmp_path: Path) -> None:
    """A photo that happens to have a name of ours would be replaced by a drawing."""
    photo = tmp_path / "test" / "bird" / "00000.png"
    photo.parent.mkdir(parents=True)
    Image.new("RGB", (640, 480)).save(photo)
    before = photo.read_bytes()
    with pytest.raises(DataError, match=r"00000\.png: is no picture of ours and is left as it is; [^\n]+$"):
        write_classes(tmp_path, "test", 1)
    assert photo.read_bytes() == before


@pytest.mark.parametrize(("split", "count"), [("trian", 1), ("val", 0)])
def test_wrong_arguments(tmp_path: Path, split: str, count: int) -> None:
    """A mistyped split would write pictures that belong to none."""
    with pytest.raises(DataError, match="emoji classes"):
        write_classes(tmp_path, split, count)
    assert not list(tmp_path.iterdir())


def test_every_class_has_prompts_in_words() -> None:
    """The base could not be measured zero-shot: the prompts would not fit the classes."""
    prompts = class_prompts(tuple(class_objects()), emoji_prompts())
    objects = load_art().objects
    for members, texts in zip(class_objects().values(), prompts, strict=True):
        assert len(texts) == len(members)
        assert all(objects[i].english[0] in text for i, text in zip(members, texts, strict=True))
    assert all("_" not in text for texts in prompts for text in texts)
