"""Hugging Face data sets: what `datasets` writes, with the images inside, is read as `datasets` reads it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torchvision.transforms.functional import to_tensor

import clipgraft as cg
from clipgraft import stored_images
from clipgraft.data.loading import image_batches
from clipgraft.data.reader import read_labelled, read_pairs
from clipgraft.data.stored_rows import file_ids
from clipgraft.errors import ConfigError, DataError
from clipgraft.pictures import ImageError, open_image
from tiny_pictures import write_pictures


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV of 12 images and 24 captions. Read only."""
    return write_pictures(tmp_path_factory.mktemp("loose"))


@pytest.fixture(scope="module")
def made(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A data set of those images with lists of captions, and classes."""
    import datasets

    datasets.disable_progress_bars()
    pairs = cg.read_pairs(table)
    columns = {
        "image": [{"bytes": image.read_bytes(), "path": image.name} for image in pairs.images],
        "caption": [list(texts) for texts in pairs.captions],
        "label": [number % 2 for number in range(len(pairs))],
    }
    found = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    return found.cast_column("label", datasets.ClassLabel(names=["mèo", "chó"]))


def assert_same(pairs: cg.Pairs, made: Any) -> None:
    """The pixels and captions that `datasets` itself gives."""
    assert len(pairs) == len(made)
    for (image, captions), row in zip(pairs, made, strict=True):
        assert list(captions) == row["caption"]
        assert np.array_equal(np.asarray(open_image(image)), np.asarray(row["image"].convert("RGB")))


def test_parquet_with_images_inside(made: Any, tmp_path: Path) -> None:
    """A Parquet file of the hub would have to be unpacked first, or give images of other rows."""
    path = tmp_path / "train.parquet"
    made.to_parquet(str(path), batch_size=5)
    pairs = read_pairs(path)
    assert_same(pairs, made)
    assert pairs.report is not None
    assert pairs.report.kind == "parquet, images inside"
    assert [image.relative_to(tmp_path).as_posix() for image in pairs.images[:2]] == [
        "train.parquet/image/0",
        "train.parquet/image/1",
    ]
    assert [read_labelled(path).classes[label] for label in read_labelled(path).labels[:2]] == ["mèo", "chó"]
    before = file_ids(list(pairs.images))
    os.utime(path, ns=(1, 1))
    assert not set(file_ids(list(pairs.images))) & set(before)
    with pytest.raises(ConfigError, match="`image_root` given, but the images are inside"):
        read_pairs(path, image_root=tmp_path)
    for name in ("image/12", "image/x", "caption/../image/1", "none/1", "../../x"):
        with pytest.raises(ImageError, match="not found"):
            open_image(f"{path}/{name}")


def test_groups_that_stay_decoded_are_bounded(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images read in shuffled order would be another row's once groups are dropped, or fill the memory."""
    monkeypatch.setattr(stored_images, "GROUPS_KEPT", 1)
    monkeypatch.setattr("clipgraft.data.columnar.GROUPS_KEPT", 1)
    monkeypatch.setattr("clipgraft.data.columnar._LARGE", 4)
    path = tmp_path / "train.parquet"
    made.to_parquet(str(path), batch_size=5)
    pairs = read_pairs(path)
    assert_same(pairs[::-1], made.select(range(11, -1, -1)))
    assert pairs.report is not None
    assert "images are stored in groups of up to 5: " in " ".join(pairs.report.notes)


def test_worker_processes_read_cells(made: Any, tmp_path: Path) -> None:
    """Processes that decode ahead would share one reader, and hang or take other rows."""
    made.to_parquet(str(tmp_path / "t.parquet"), batch_size=5)
    images = read_pairs(tmp_path / "t.parquet").images  # this process has a reader of its own now
    for ids, pixels in image_batches(images[::-1], to_tensor, batch_size=5, workers=2):
        for number, picture in zip(ids.tolist(), pixels, strict=True):
            assert torch.equal(picture, to_tensor(made[11 - number]["image"].convert("RGB")))


def test_save_to_disk(made: Any, tmp_path: Path) -> None:
    """A folder of `save_to_disk` would be refused, or its parts be mixed."""
    import datasets

    made.save_to_disk(str(tmp_path / "one"), num_shards=2)
    assert_same(read_pairs(tmp_path / "one"), made)
    parts = datasets.DatasetDict({"train": made.select(range(8)), "test": made.select(range(8, 12))})
    parts.save_to_disk(str(tmp_path / "parts"))
    assert_same(read_pairs(tmp_path / "parts", split="train"), made.select(range(8)))
    assert read_labelled(tmp_path / "parts", split="test").classes == ("chó", "mèo")
    with pytest.raises(DataError, match=r"has parts, which must not be mixed: train \(1 files\), test"):
        read_pairs(tmp_path / "parts")
    with pytest.raises(DataError, match=r'`split`: no part "trian"; .*; did you mean "train"\?'):
        read_pairs(tmp_path / "parts", split="trian")


def test_a_folder_as_on_the_hub(made: Any, tmp_path: Path) -> None:
    """A downloaded data set would be read with its test images in it."""
    data = tmp_path / "data"
    data.mkdir()
    for number in range(2):
        part = made.select(range(4 * number, 4 * number + 4))
        part.to_parquet(str(data / f"train-0000{number}-of-00002-0a1b.parquet"))
    made.select(range(8, 12)).to_parquet(str(data / "validation-00000-of-00001.parquet"))
    (tmp_path / "README.md").write_text("a data set")
    assert_same(read_pairs(tmp_path, split="train"), made.select(range(8)))
    assert_same(read_pairs(tmp_path, split="val"), made.select(range(8, 12)))
    assert len(read_pairs(tmp_path, split="train,val")) == 12
    with pytest.raises(DataError, match="name one with `split`"):
        read_pairs(tmp_path)
    (data / "train-00001-of-00002-0a1b.parquet").unlink()
    with pytest.raises(DataError, match="has 1 of the 2 files of train; fetch the others too"):
        read_pairs(tmp_path, split="train")


def test_names_in_a_saved_folder_stay_in_it(made: Any, tmp_path: Path) -> None:
    """A folder from elsewhere would have files of this machine read."""
    made.save_to_disk(str(tmp_path / "saved"))
    state = tmp_path / "saved" / "state.json"
    record = json.loads(state.read_text())
    shutil.move(str(tmp_path / "saved" / record["_data_files"][0]["filename"]), tmp_path / "x.arrow")
    for name, says in (("../x.arrow", "names no data files"), ("gone.arrow", "gone.arrow is missing")):
        state.write_text(json.dumps({**record, "_data_files": [{"filename": name}]}))
        with pytest.raises(DataError, match=says):
            read_pairs(tmp_path / "saved")


def test_cells_without_bytes(table: Path, tmp_path: Path) -> None:
    """An image that is only named in its cell, or a damaged one, would be another image, or end the run."""
    cells = [
        {"bytes": None, "path": str(table.parent / "0.png")},
        {"bytes": (table.parent / "1.png").read_bytes(), "path": "x.png"},
        {"bytes": b"", "path": None},
        {"bytes": None, "path": None},
        {"bytes": b"no image", "path": None},
    ]
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"image": cells, "caption": list("abcde")}), path)
    pairs = read_pairs(path)
    assert [image.as_posix() for image in pairs.images] == [str(table.parent / "0.png"), f"{path}/image/1"]
    assert pairs.captions == (("a",), ("b",))
    content = path.read_bytes()
    path.write_bytes(content[:4] + b"\xff" * 2000 + content[2004:])
    with pytest.raises(DataError) as error:
        read_pairs(path)
    assert "\n" not in str(error.value)
