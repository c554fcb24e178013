"""Split files of few-shot papers: the eleven sets as CoOp's instructions lay them out, and hostile ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import clipgraft as cg
from clipgraft.data.class_splits import read_split
from clipgraft.data.published_sets import PUBLISHED_SETS, read_published, read_published_shots

# Written from DATASETS.md: folder, folder of the images that split paths are relative to, split file.
LAYOUTS = {
    "caltech101": ("caltech-101", "101_ObjectCategories", "split_zhou_Caltech101.json"),
    "oxford_pets": ("oxford_pets", "images", "split_zhou_OxfordPets.json"),
    "stanford_cars": ("stanford_cars", ".", "split_zhou_StanfordCars.json"),
    "oxford_flowers": ("oxford_flowers", "jpg", "split_zhou_OxfordFlowers.json"),
    "food101": ("food-101", "images", "split_zhou_Food101.json"),
    "sun397": ("sun397", "SUN397", "split_zhou_SUN397.json"),
    "dtd": ("dtd", "images", "split_zhou_DescribableTextures.json"),
    "eurosat": ("eurosat", "2750", "split_zhou_EuroSAT.json"),
    "ucf101": ("ucf101", "UCF-101-midframes", "split_zhou_UCF101.json"),
}
NAMES = ("zebra", "ant", "cow")  # numbers, not names, are the order of classes
Row = list[Any]


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path)


def rows(part: str, count: int) -> list[Row]:
    return [[f"{name}/{part}{i}.jpg", label, name] for label, name in enumerate(NAMES) for i in range(count)]


def lay_out(root: Path, name: str) -> None:
    """Two training images and one test image of each of three classes, where the instructions put them."""
    if name == "imagenet":
        wnids = {"n001": "zebra", "n002": "ant", "n003": "cow"}
        folder = root / "imagenet"
        for wnid in wnids:
            for image in ("train/{}/a.JPEG", "train/{}/b.JPEG", "val/{}/c.JPEG"):
                picture(folder / "images" / image.format(wnid))
        (folder / "classnames.txt").write_text("".join(f"{w} {n}\n" for w, n in wnids.items()))
    elif name == "fgvc_aircraft":
        folder = root / "fgvc_aircraft"
        (folder / "images").mkdir(parents=True)
        (folder / "variants.txt").write_text("zebra\nant\ncow\n")
        for part, count in (("train", 2), ("val", 1), ("test", 1)):
            lines = [f"{part}{label}{i} {n}\n" for label, n in enumerate(NAMES) for i in range(count)]
            (folder / f"images_variant_{part}.txt").write_text("".join(lines))
            for line in lines:
                picture(folder / "images" / f"{line.split()[0]}.jpg")
    else:
        folder, images, split = LAYOUTS[name]
        parts = {"train": rows("train", 2), "val": rows("val", 1), "test": rows("test", 1)}
        for path, _, _ in [*parts["train"], *parts["test"]]:
            picture(root / folder / images / path)
        (root / folder / split).write_text(json.dumps(parts))


@pytest.mark.parametrize("name", sorted([*LAYOUTS, "imagenet", "fgvc_aircraft"]))
def test_every_published_set_is_read_where_its_instructions_put_it(name: str, tmp_path: Path) -> None:
    """A set that was downloaded as CoOp says is not found, or its images get other classes."""
    lay_out(tmp_path, name)
    splits = read_published(name, tmp_path)
    assert splits.names == NAMES
    assert splits.train.labels == (0, 0, 1, 1, 2, 2)
    assert splits.test.labels == (0, 1, 2)
    assert all(path.is_file() for path in (*splits.train.images, *splits.test.images))
    base, novel = splits.halves()
    assert (base.names, novel.names) == (("zebra", "ant"), ("cow",)), "the first half, rounded up, is base"
    assert novel.test.labels == (0,)
    assert "{}" in PUBLISHED_SETS[name].template


def test_a_published_draw_is_read_by_shots_and_seed(tmp_path: Path) -> None:
    """Whoever has 2SFS's files of shots is measured on other images than theirs."""
    lay_out(tmp_path, "eurosat")
    splits = read_published("eurosat", tmp_path)
    shots = tmp_path / "eurosat" / "split_fewshot" / "shot_1-seed_2_train.jsonl"
    shots.parent.mkdir()

    def write(paths: list[str]) -> None:
        lines = [
            {"_impath": path, "_label": label, "_domain": 0, "_classname": NAMES[label]}
            for label, path in enumerate(paths)
        ]
        shots.write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    write([f"eurosat/2750/{name}/train1.jpg" for name in NAMES])
    draws = read_published_shots("eurosat", tmp_path, splits, [1, 2], range(1, 4))
    assert list(draws) == [(1, 2)]
    assert [path.name for path in draws[1, 2].images] == ["train1.jpg"] * 3
    assert draws[1, 2].labels == (0, 1, 2)
    write(["eurosat/2750/../../../secret.jpg"] * 3)
    with pytest.raises(cg.errors.DataError, match="outside"):
        read_published_shots("eurosat", tmp_path, splits, [1], [2])


@pytest.fixture
def split(tmp_path: Path) -> Path:
    lay_out(tmp_path, "eurosat")
    return tmp_path / "eurosat" / "split_zhou_EuroSAT.json"


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (["../outside.jpg", 0, "zebra"], "outside of"),
        (["/etc/passwd", 0, "zebra"], "outside of"),
        (["a.jpg", "0x", "zebra"], r"train\[0\]\[1\] is '0x', and should be a whole number"),
        (["a.jpg", -1, "zebra"], r"train\[0\]\[1\] is -1"),
        (["a.jpg", 0, None], r"train\[0\]\[2\] is None, and should be text"),
        (["a.jpg", 0], r"train\[0\]\[2\] is missing"),
        (["zebra/train0.jpg", 0, "horse"], "class 0 is called 'horse' and 'zebra'"),
    ],
)
def test_a_hostile_split_is_refused(row: Row, fault: str, split: Path) -> None:
    """A split from elsewhere reads files outside of its folder, or ends in a traceback."""
    content = json.loads(split.read_text())
    content["train"].insert(0, row)
    split.write_text(json.dumps(content))
    with pytest.raises(cg.errors.DataError, match=fault):
        read_split(split, split.parent / "2750")


def test_absent_images_are_counted(split: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Accuracy is of fewer images or classes than the split has, and nothing says so."""
    images = split.parent / "2750"
    (images / "ant" / "train0.jpg").unlink()
    for number in (0, 1):
        (images / "cow" / f"train{number}.jpg").unlink()
    splits = read_split(split, images)
    assert splits.names == ("zebra", "ant")
    assert "3 of 6 train images are not there" in caplog.text
    assert "classes without a training image are left out: 1 (cow)" in caplog.text
    with pytest.raises(cg.errors.DataError, match="3 of 6 train images are not there"):
        read_split(split, images, strict=True)
    with pytest.raises(cg.errors.DataError, match="none of its 6 train images is there"):
        read_split(split, tmp_path / "elsewhere")


def test_classes_that_share_a_name_stay_two(split: Path, caplog: pytest.LogCaptureFixture) -> None:
    """ImageNet has two classes of one name: their images would be one class, and accuracy another."""
    content = json.loads(split.read_text().replace('"cow"]', '"ant"]'))
    split.write_text(json.dumps(content))
    splits = read_split(split, split.parent / "2750")
    assert splits.names == ("zebra", "ant", "ant")
    assert splits.train.classes == ("zebra", "ant (1)", "ant (2)")
    assert "share a name" in caplog.text
