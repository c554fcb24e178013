"""JSON as data sets of captions are published in it, and as labelling tools export it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from clipgraft.cli.flags.shared import DataFlags
from clipgraft.data.reader import read_labelled, read_pairs
from clipgraft.errors import ConfigError, DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four images, and below them one more."""
    for number, name in enumerate(("0.png", "1.png", "2.png", "3.png", "sub/4.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / name)
    return tmp_path


def read(folder: Path, content: Any, **options: Any) -> list[tuple[str, tuple[str, ...]]]:
    """The pairs of a JSON file, images as written below its folder."""
    path = folder / "t.json"
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return [(image.relative_to(folder).as_posix(), texts) for image, texts in read_pairs(path, **options)]


def test_karpathys_parts(folder: Path) -> None:
    """Test images would be trained on, or a part could not be named without a script."""
    parts = ("train", "restval", "val", "test")
    images: list[dict[str, Any]] = [
        {"filepath": "", "filename": f"{n}.png", "split": part, "sentences": [{"raw": part}, {"raw": "b"}]}
        for n, part in enumerate(parts)
    ]
    images += [{**images[0], "filepath": "sub", "filename": "4.png"}]
    karpathy = {"images": images, "dataset": "coco"}
    assert read(folder, karpathy, split="train") == [
        ("0.png", ("train", "b")),
        ("sub/4.png", ("train", "b")),
    ]
    assert [name for name, _ in read(folder, karpathy, split="test, restval")] == ["1.png", "3.png"]
    with pytest.raises(
        DataError, match=r"must not be mixed: train \(2\), restval \(1\).* name one with `split`"
    ):
        read(folder, karpathy)
    with pytest.raises(DataError, match=r'`split`: no part "trian"; .*; did you mean "train"\?'):
        read(folder, karpathy, split="trian")
    entries = [{"image": f"{n}.png", "caption": "x", "split": part} for n, part in enumerate(parts)]
    assert read(folder, entries, split="val") == [("2.png", ("x",))]
    with pytest.raises(DataError, match=r"no part .*; the parts are: none; name one of them"):
        read(folder, [{"image": "0.png", "caption": "x"}], split="val")
    with pytest.raises(
        ConfigError, match=r"`split` given, but .* is no table or data set with parts; leave it"
    ):
        read_pairs(folder, split="val")


def test_validation_data_have_a_part_of_their_own() -> None:
    """`--split train` would validate on the training data."""
    flags = DataFlags(train_data=Path("a"), val_data=Path("b"), split="train")
    assert flags.for_validation().split is None
    assert flags.replace(val_split="val").for_validation().split == "val"
    assert flags.for_test().split == "test"
    assert DataFlags(val_data=Path("b"), split="test").for_validation().split == "test", "clipgraft eval"


def test_vietnamese_coco(folder: Path) -> None:
    """KTVIC and UIT-ViIC would need a script: they write `filename`, and a second, segmented caption."""
    whole = {
        "images": [{"id": 7, "filename": "0.png"}, {"id": "8", "coco_url": "http://x/val2017/1.png?a=b"}],
        "annotations": [
            {"id": 1, "image_id": 7, "caption": "xe đạp", "segment_caption": "xe_đạp"},
            {"id": 2, "image_id": 8, "caption": "hai con", "segment_caption": "hai con"},
        ],
    }
    assert read(folder, whole) == [("0.png", ("xe đạp",)), ("1.png", ("hai con",))]
    assert read(folder, whole, csv_caption_key="segment_caption")[0] == ("0.png", ("xe_đạp",))


def test_llava(folder: Path) -> None:
    """Questions would be learnt as captions, or entries of text alone end the run as bad rows."""
    ask = {"from": "human", "value": "<image>\nWhat is it?"}
    entries = [
        {"id": "0", "image": "0.png", "conversations": [ask, {"from": "gpt", "value": "<image> a dog"}]},
        {"id": "1", "conversations": [ask, {"from": "gpt", "value": "no image"}]},
        {
            "images": ["1.png"],
            "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a cat"}],
        },
    ]
    assert read(folder, entries) == [("0.png", ("a dog",)), ("1.png", ("a cat",))]
    report = read_pairs(folder / "t.json").report
    assert report is not None
    assert (report.kind, report.bad_rows) == ("json, LLaVA's conversations", 0)
    assert "1 entries of text alone, without an image: left out" in report.notes
    (folder / "t.jsonl").write_text("\n".join(json.dumps(entry) for entry in entries))
    assert read_pairs(folder / "t.jsonl").captions == (("a dog",), ("a cat",))


def test_blip(folder: Path) -> None:
    """The annotation files of BLIP, one caption an entry or a list of them, could not be named."""
    entries = [{"image": "0.png", "caption": "a", "image_id": "x"}, {"image": "1.png", "caption": ["b", "c"]}]
    assert read(folder, entries) == [("0.png", ("a",)), ("1.png", ("b", "c"))]


def test_label_studio(folder: Path) -> None:
    """What people wrote or chose in Label Studio could not be learnt without a script."""

    def task(image: str, *texts: str, choice: str = "x", cancelled: bool = False) -> dict[str, Any]:
        results = [{"type": "textarea", "from_name": "mô tả", "value": {"text": list(texts)}}]
        results += [{"type": "choices", "from_name": "kind", "value": {"choices": [choice]}}]
        notes = [{"result": results, "was_cancelled": cancelled}]
        return {"id": 1, "data": {"captioning": image}, "annotations": notes, "predictions": []}

    tasks = [
        task("/data/local-files/?d=sub%2F4.png", "một", "hai"),
        task("/data/upload/1/0.png", "ba", choice="y"),
        task("1.png", "bốn", cancelled=True),
    ]
    wanted = [("sub/4.png", ("một", "hai")), ("upload/1/0.png", ("ba",))]
    (folder / "upload/1").mkdir(parents=True)
    (folder / "0.png").rename(folder / "upload/1/0.png")
    assert read(folder, tasks) == wanted
    assert read(folder, tasks, csv_caption_key="mô tả") == wanted
    assert read_labelled(folder / "t.json").classes == ("x", "y")
