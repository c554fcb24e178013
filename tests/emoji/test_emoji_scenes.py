"""EmojiScenes: the same everywhere, cleanly split, and written in real language."""

from __future__ import annotations

import csv
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clipgraft.emoji.art import ART, load_art, sprite
from clipgraft.emoji.captions import WORDS, name_group
from clipgraft.emoji.drawing import COLOURS, PATTERNS, Group, Stream, cells, combination_split
from clipgraft.emoji.scenes import LANGUAGES, EmojiScenes, write_scenes
from clipgraft.errors import DataError


def _codes(scenes: EmojiScenes, index: int) -> frozenset[str]:
    return frozenset(load_art().objects[g.index].code for g in scenes.scene(index).groups)


def test_scenes_do_not_depend_on_order_or_size() -> None:
    """Two people with the same seed would train on different pictures."""
    forward = [EmojiScenes("train", 12).image(i).tobytes() for i in range(12)]
    backward = [EmojiScenes("train", 5000).image(i).tobytes() for i in reversed(range(12))]
    assert forward == backward[::-1]
    assert EmojiScenes("train", 12).captions(3, "vi") == EmojiScenes("train", 99).captions(3, "vi")


def test_what_a_scene_shows_is_fixed_for_ever() -> None:
    """The shipped base, and every published number, would belong to other scenes than the package makes."""
    assert (
        EmojiScenes("test", 1).captions(0)[4]
        == "left a house, middle a maple leaf, right three cocktail glasses"
    )
    assert EmojiScenes("test", 13).captions(12, "vi")[1] == "bốn cái cờ lê nằm bên trái một cây nấm"
    stream = Stream("fixed")
    assert [stream.below(1000) for _ in range(4)] == [352, 342, 933, 775]


def test_seeds_and_splits_give_different_scenes() -> None:
    """A new seed would bring no new data, or the test split would repeat the training scenes."""
    pictures = {
        EmojiScenes(split, 8, seed).image(i).tobytes()
        for split in ("train", "val", "test")
        for seed in (0, 1)
        for i in range(8)
    }
    assert len(pictures) == 48


def test_splits_share_no_combination_of_objects() -> None:
    """Test recall would be measured on combinations that were trained on."""
    seen = {
        split: {_codes(EmojiScenes(split, 400, seed), i) for seed in (0, 1) for i in range(400)}
        for split in ("train", "val", "test")
    }
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["val"]
    assert not seen["val"] & seen["test"]


@given(st.lists(st.sampled_from([o.code for o in load_art().objects]), min_size=1, max_size=3, unique=True))
def test_split_ignores_the_order_of_objects(codes: list[str]) -> None:
    """The same pair of objects would be trained on in one order and tested in the other."""
    assert combination_split(codes) == combination_split(codes[::-1])


def test_objects_lie_apart_and_inside_the_picture() -> None:
    """Objects would hide each other, or captions would name things outside the picture."""
    scenes = EmojiScenes("train", 300)
    for i in range(300):
        scene = scenes.scene(i)
        boxes = [box for place in range(len(scene.groups)) for box in cells(scene, place)]
        assert len(boxes) == sum(group.count for group in scene.groups)
        assert all(x >= 0 and y >= 0 and x + w <= 96 and y + h <= 96 for x, y, w, h in boxes)
        for n, (x, y, w, h) in enumerate(boxes):
            assert all(x + w <= a or a + c <= x or y + h <= b or b + d <= y for a, b, c, d in boxes[n + 1 :])


def test_captions_tell_left_from_right_as_painted() -> None:
    """A model would learn "left" for what is on the right."""
    scenes = EmojiScenes("train", 200)
    for i in range(200):
        scene = scenes.scene(i)
        if scene.layout == "row" and len(scene.groups) == 2:
            first, last = (name_group(group, "en") for group in scene.groups)
            left, right = f"on the left {first}", f"on the right {last}"
            assert scenes.captions(i)[4] in (f"{left}, {right}", f"{right}, {left}")
            assert max(x + w for x, _, w, _ in cells(scene, 0)) <= min(x for x, _, _, _ in cells(scene, 1))


@pytest.mark.parametrize("language", LANGUAGES)
def test_five_distinct_captions_in_nfc(language: str) -> None:
    """Duplicate captions break five-caption recall; text that is not NFC does not match what users type."""
    scenes = EmojiScenes("val", 250)
    for i in range(250):
        captions = scenes.captions(i, language)
        assert len(set(captions)) == 5
        assert all(unicodedata.is_normalized("NFC", caption) and "{" not in caption for caption in captions)
        assert all(caption == " ".join(caption.split()) for caption in captions)


def test_sentences_are_grammatical() -> None:
    """Captions would teach "a orange background", "three apple" or a Vietnamese noun without classifier."""
    scenes = EmojiScenes("train", 400)
    for i in range(400):
        text = " ".join(scenes.captions(i))
        assert not any(f" a {vowel}" in f" {text}" for vowel in "aeio")
        for group in scenes.scene(i).groups:
            phrase = name_group(group, "vi")
            assert phrase.split()[0] == ("một", "hai", "ba", "bốn")[group.count - 1]
    apples = next(n for n, o in enumerate(load_art().objects) if o.code == "1F34E")
    group = Group(apples, 3)
    assert [name_group(group, language) for language in ("en", "vi", "tr")] == [
        "three red apples",
        "ba quả táo đỏ",
        "üç kırmızı elma",
    ]


def test_every_language_has_every_word() -> None:
    """A caption in one of the languages would fail with KeyError on a rare colour or pattern."""
    for language, words in WORDS.items():
        assert len(words.colours) == len(COLOURS), language
        assert set(words.grounds) == set(PATTERNS), language
        assert all(thing.names[language] for thing in load_art().objects)


def test_art_is_complete_and_small() -> None:
    """A wheel would miss sprites or licences, or grow beyond what may be shipped."""
    art = load_art()
    assert len(art.objects) >= 200
    assert len(art.categories) >= 15
    per_category = [sum(o.category == c for o in art.objects) for c in art.categories]
    assert sum(per_category) == len(art.objects)
    assert sum(n >= 5 for n in per_category) >= 15
    assert len({o.code for o in art.objects}) == len(art.objects)
    assert sum(path.stat().st_size for path in ART.iterdir()) <= 3_000_000
    licences = (ART / "LICENSES.md").read_text(encoding="utf-8")
    assert all(name in licences for name in ("CC BY-SA 4.0", "CC BY 4.0", "Apache-2.0", "Unicode-3.0"))


@pytest.mark.parametrize("style", range(3))
def test_every_sprite_shows_something(style: int) -> None:
    """A caption would name an object whose picture is empty in one art style."""
    for index in range(len(load_art().objects)):
        image = sprite(style, index, 48, 0)
        opaque = sum(image.getchannel("A").histogram()[128:])
        assert opaque > 100, load_art().objects[index]


def test_written_scenes_read_back(tmp_path: Path) -> None:
    """The demo would train on files that differ from the data set, or on half-written pictures."""
    tables = write_scenes(tmp_path, "test", 3, ["en", "vi"])
    scenes = EmojiScenes("test", 3)
    assert set(tables) == {"en", "vi"}
    with tables["vi"].open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["caption"] for row in rows[5:10]] == list(scenes.captions(1, "vi"))
    assert len(rows) == 15
    picture = tmp_path / rows[5]["image"]
    with Image.open(picture) as image:
        assert image.tobytes() == scenes.image(1).tobytes()
    kept = (tmp_path / rows[0]["image"]).stat().st_mtime_ns
    picture.write_bytes(picture.read_bytes()[:200])
    write_scenes(tmp_path, "test", 3, ["en"])
    with Image.open(picture) as image:
        assert image.tobytes() == scenes.image(1).tobytes()
    assert (tmp_path / rows[0]["image"]).stat().st_mtime_ns == kept


def test_files_of_a_user_stay(tmp_path: Path) -> None:
    """A photo or table that happens to have a name of ours would be replaced."""
    photo, table = tmp_path / "images" / "val_00001.png", tmp_path / "val.vi.csv"
    photo.parent.mkdir()
    for path, content in ((photo, b"\xff\xd8 a photo"), (table, b"name,age\nLan,7\n")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"of ours and is left as it is; write to an empty folder$"):
            write_scenes(tmp_path, "val", 2, ["vi"])
        assert path.read_bytes() == content
        path.unlink()


@settings(max_examples=20)
@given(st.text(max_size=8))
def test_wrong_names_are_refused(name: str) -> None:
    """A mistyped split or language would silently give other data."""
    if name not in ("train", "val", "test"):
        with pytest.raises(DataError, match="choose one of"):
            EmojiScenes(name, 1)
    if name not in LANGUAGES:
        with pytest.raises(DataError, match="choose one of"):
            EmojiScenes("train", 1).captions(0, name)


def test_index_outside_is_refused() -> None:
    """Scenes beyond the size asked for would leak into a loop."""
    with pytest.raises(IndexError, match="outside"):
        EmojiScenes("train", 2).image(2)
    with pytest.raises(DataError, match="size"):
        EmojiScenes("train", -1)
