"""`encode_folder`: every usable item once, with the model's own vector, whatever else lies there."""

from __future__ import annotations

import json
import logging
import os
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import clipgraft as cg
from clipgraft.data.args import TableArgs
from clipgraft.models.clip import Clip
from clipgraft.pictures import open_image
from clipgraft.search.encode import encode_folder
from clipgraft.search.sources import open_images
from encoded_folders import (
    BAD,
    GOOD,
    read_encoded,
    read_errors,
    tree_bytes,
    vectors_one_by_one,
    write_picture,
)

SMALL = {"batch_size": 4, "shard_rows": 6, "workers": 0, "autocast": False}


def test_vectors_are_those_of_a_plain_loop(clip: Clip, pictures: Path, tmp_path: Path) -> None:
    """A search would find other images than the model itself would choose."""
    out = tmp_path / "out"
    result = encode_folder(clip, pictures, out, dtype="float32", exact_preprocess=True, **SMALL)
    found = read_encoded(out)
    assert len(found) == result.rows == GOOD
    steps = clip.require_preprocess()
    for key, vector in found.items():
        alone = clip.encode_image(steps(open_image(pictures / key))[None], normalize=True)[0]
        assert vector == pytest.approx(alone.detach().numpy(), abs=1e-5)
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)


def test_the_default_is_fp16_and_close(clip: Clip, pictures: Path, tmp_path: Path) -> None:
    """The faster preprocessing and half precision must not move a vector by more than rounding."""
    encode_folder(clip, pictures, tmp_path / "out", **SMALL)
    found = read_encoded(tmp_path / "out")
    vectors = np.stack(list(found.values()))
    assert vectors.dtype == np.float16
    assert vectors == pytest.approx(vectors_one_by_one(clip, pictures, list(found)), abs=1e-2)


def test_layout_and_metadata(clip: Clip, pictures: Path, tmp_path: Path) -> None:
    """clip-retrieval's tools and a user's own scripts would not find their files, or read wrong sizes."""
    out = tmp_path / "out"
    encode_folder(clip, pictures, out, **SMALL)
    assert sorted(p.name for p in (out / "img_emb").iterdir()) == [f"img_emb_{i}.npy" for i in range(4)]
    rows = [
        row for n in range(4) for row in pq.read_table(out / f"metadata/metadata_{n}.parquet").to_pylist()
    ]
    by_path = {row["path"]: row for row in rows}
    assert list(by_path) == sorted(by_path)
    file = pictures / "b/c/05.jpg"
    row = by_path["b/c/05.jpg"]
    assert (row["bytes"], row["width"], row["height"]) == (file.stat().st_size, 41, 40)
    assert row["mtime"].timestamp() == pytest.approx(file.stat().st_mtime, abs=1e-5)
    assert (row["caption"], row["adapter"], row["base_fingerprint"]) == (None, None, clip.fingerprint)


def test_unusable_images_are_listed(clip: Clip, pictures: Path, tmp_path: Path) -> None:
    """One broken download among millions would end the run, or vanish without a word."""
    result = encode_folder(clip, pictures, tmp_path / "out", **SMALL)
    errors = read_errors(tmp_path / "out")
    assert set(errors) == BAD
    assert result.errors == 2
    assert "cut short" in errors["a/broken.jpg"]
    assert "empty" in errors["b/empty.png"]


def test_only_unusable_images(clip: Clip, tmp_path: Path) -> None:
    """A folder of nothing but broken files must end with a list of them, not with a traceback."""
    for number in range(5):
        (tmp_path / "in" / f"{number}.jpg").parent.mkdir(exist_ok=True)
        (tmp_path / "in" / f"{number}.jpg").write_bytes(b"\xff\xd8 no")
    result = encode_folder(clip, tmp_path / "in", tmp_path / "out", **SMALL)
    assert (result.rows, result.errors) == (0, 5)
    assert len(read_errors(tmp_path / "out")) == 5


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_nothing(clip: Clip, pictures: Path, tmp_path: Path, workers: int) -> None:
    """The result would depend on how many processes decode."""
    encode_folder(clip, pictures, tmp_path / "one", **SMALL)
    encode_folder(clip, pictures, tmp_path / "two", **{**SMALL, "workers": workers})
    assert tree_bytes(tmp_path / "one") == tree_bytes(tmp_path / "two")


def test_progress_ends_at_the_total(clip: Clip, pictures: Path, tmp_path: Path) -> None:
    """A bar that never fills, or overfills, tells nobody how long it will take."""
    told: list[tuple[int, int]] = []
    encode_folder(clip, pictures, tmp_path / "out", progress=lambda *now: told.append(now), **SMALL)
    assert told[-1] == (GOOD + 2, GOOD + 2)
    assert told == sorted(told)


def test_a_table_with_captions(clip: Clip, pictures: Path, tmp_path: Path) -> None:
    """Captions would be lost, an image of five captions encoded five times, or a missing file be fatal."""
    table = pictures / "pairs.csv"
    table.write_text(
        "image,caption\na/01.jpg,một con mèo\nb/c/02.png,a dog\na/01.jpg,a cat\n"
        "a/01.jpg,một con mèo\ngone.png,x\n",
        encoding="utf-8",
    )
    out = tmp_path / "out"
    result = encode_folder(clip, table, out, **SMALL)
    rows = pq.read_table(out / "metadata/metadata_0.parquet").to_pylist()
    assert [(row["path"], row["caption"]) for row in rows] == [
        ("a/01.jpg", "một con mèo\na cat"),
        ("b/c/02.png", "a dog"),
    ]
    assert (result.rows, list(read_errors(out))) == (2, ["gone.png"])


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_table_of_paths_alone(clip: Clip, pictures: Path, tmp_path: Path, ending: str) -> None:
    """Who only wants vectors has no captions, and would have to invent a column of them."""
    paths = ["a/01.jpg", "b/c/02.png"]
    table = pictures / f"list.{ending}"
    if ending == "parquet":
        import pyarrow as pa

        pq.write_table(pa.table({"filepath": paths}), table)
    elif ending == "jsonl":
        table.write_text("".join(json.dumps({"filepath": path}) + "\n" for path in paths))
    else:
        table.write_text("\n".join(["filepath,width", *(f"{path},3" for path in paths)]))
    encode_folder(clip, table, tmp_path / "out", **SMALL)
    rows = pq.read_table(tmp_path / "out/metadata/metadata_0.parquet").to_pylist()
    assert [(row["path"], row["caption"]) for row in rows] == [(path, None) for path in paths]


def test_texts(clip: Clip, tmp_path: Path) -> None:
    """Text vectors would be of other texts, or out of the order of the file."""
    file = tmp_path / "texts.txt"
    file.write_text("một con mèo\na dog\n\nmột con mèo\nzebra\nant\n", encoding="utf-8")
    result = encode_folder(clip, file, tmp_path / "out", texts=True, dtype="float32", **SMALL)
    found = read_encoded(tmp_path / "out", "text_emb", "caption")
    assert list(found) == ["một con mèo", "a dog", "zebra", "ant"]
    assert result.rows == 4
    expected = clip.encode_text(list(found), normalize=True).detach().numpy()
    assert np.stack(list(found.values())) == pytest.approx(expected, abs=1e-5)


def test_texts_of_a_table(clip: Clip, tmp_path: Path) -> None:
    """The caption column of a training table could not be encoded."""
    file = tmp_path / "pairs.tsv"
    file.write_text("filepath\ttitle\nx.jpg\ta dog\ny.jpg\ta cat\n", encoding="utf-8")
    encode_folder(clip, file, tmp_path / "out", texts=True, **SMALL)
    assert list(read_encoded(tmp_path / "out", "text_emb", "caption")) == ["a dog", "a cat"]


def test_listing_is_lazy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten million paths would be held in memory before the first image is encoded."""
    for number in range(4):
        write_picture(tmp_path / "in" / f"{number}.png", number)
    looked: list[str] = []
    real = os.scandir

    class Entries:
        """Counts the entries that are taken out of a folder."""

        def __init__(self, folder: Any) -> None:
            self.inner = real(folder)

        def __enter__(self) -> Any:
            return (looked.append(entry.name) or entry for entry in self.inner)  # type: ignore[func-returns-value]

        def __exit__(self, *_: object) -> None:
            self.inner.close()

    monkeypatch.setattr("clipgraft.search.sources.os.scandir", Entries)
    list(islice(open_images(str(tmp_path / "in")).items(), 2))
    assert len(looked) == 3, "the first tells that it is a folder of images"


def test_no_more_than_a_shard_is_held(clip: Clip, pictures: Path, tmp_path: Path) -> None:
    """Memory would grow with the number of images."""
    from clipgraft.search import encode

    held: list[int] = []
    real = encode._Growing.add

    def add(self: Any, *rest: Any) -> None:
        real(self, *rest)
        held.append(len(self.rows) + len(self.errors))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode._Growing, "add", add)
        encode_folder(clip, pictures, tmp_path / "out", **SMALL)
    assert max(held) == SMALL["shard_rows"]


def test_an_empty_source(clip: Clip, tmp_path: Path) -> None:
    """A wrong folder would give an empty result that looks like success."""
    (tmp_path / "in").mkdir()
    with pytest.raises(cg.errors.DataError, match="holds no images"):
        encode_folder(clip, tmp_path / "in", tmp_path / "out", **SMALL)


def test_an_address_with_a_kind_nobody_knows(clip: Clip, tmp_path: Path) -> None:
    """A missing package or a typing error would end in a page of traceback."""
    with pytest.raises(cg.errors.DataError, match="nosuch://"):
        encode_folder(clip, "nosuch://bucket/x", tmp_path / "out", **SMALL)


def test_an_address(clip: Clip, pictures: Path, tmp_path: Path) -> None:
    """Images in object storage would have to be copied first."""
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in pictures.rglob("*"):
        if path.is_file():
            memory.pipe_file(f"/pictures/{path.relative_to(pictures).as_posix()}", path.read_bytes())
    encode_folder(clip, pictures, tmp_path / "local", **SMALL)
    encode_folder(clip, "memory://pictures", tmp_path / "remote", **SMALL)
    local, remote = read_encoded(tmp_path / "local"), read_encoded(tmp_path / "remote")
    assert list(local) == list(remote)
    assert np.array_equal(np.stack(list(local.values())), np.stack(list(remote.values())))
    assert set(read_errors(tmp_path / "remote")) == BAD


def test_a_foreign_folder_is_left_alone(clip: Clip, pictures: Path, tmp_path: Path) -> None:
    """Files of somebody else would be mixed with ours, or swept away."""
    (tmp_path / "out" / "img_emb").mkdir(parents=True)
    (tmp_path / "out" / "img_emb" / "img_emb_0.npy").write_bytes(b"mine")
    with pytest.raises(cg.errors.DataError, match="is not empty"):
        encode_folder(clip, pictures, tmp_path / "out", **SMALL)
    assert (tmp_path / "out" / "img_emb" / "img_emb_0.npy").read_bytes() == b"mine"


def test_shards_report_rate_and_time_left(
    clip: Clip, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A log file of a run over night would not tell when it ends."""
    with caplog.at_level(logging.INFO, logger="clipgraft"):
        encode_folder(clip, pictures, tmp_path / "out", **SMALL)
    assert any("/s, " in line and line.endswith(" left") for line in caplog.messages)


def test_the_other_family(hf_folder: Path, pictures: Path, tmp_path: Path) -> None:
    """A transformers base would be preprocessed or encoded in another way than an open_clip one."""
    clip = cg.load(f"hf:{hf_folder}")
    encode_folder(clip, pictures, tmp_path / "out", **SMALL)
    found = read_encoded(tmp_path / "out")
    expected = vectors_one_by_one(clip, pictures, list(found))
    assert np.stack(list(found.values())) == pytest.approx(expected, abs=1e-2)


def test_bf16_is_close(clip: Clip, pictures: Path, tmp_path: Path) -> None:
    """The faster precision would give vectors that find other images."""
    encode_folder(clip, pictures, tmp_path / "out", **{**SMALL, "autocast": True})
    found = read_encoded(tmp_path / "out")
    expected = vectors_one_by_one(clip, pictures, list(found))
    assert (np.stack(list(found.values())) * expected).sum(1).min() > 0.999
    again = encode_folder(clip, pictures, tmp_path / "out", **{**SMALL, "autocast": None})
    assert (again.encoded, again.kept) == (0, GOOD)


def test_an_image_as_thin_as_a_thread(clip: Clip, tmp_path: Path) -> None:
    """One image of 2 x 50,000 pixels would fill the memory when it is resized, and end the run."""
    write_picture(tmp_path / "in" / "good.png", 1)
    Image.new("RGB", (2, 50_000)).save(tmp_path / "in" / "thin.png")
    encode_folder(clip, tmp_path / "in", tmp_path / "out", **SMALL)
    assert "too thin" in read_errors(tmp_path / "out")["thin.png"]


def test_a_folder_that_cannot_be_listed(
    clip: Clip, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One folder without permission would end the run."""
    real = os.scandir

    def scandir(folder: Any = ".") -> Any:
        if str(folder).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(folder))
        return real(folder)

    encode_folder(clip, pictures, tmp_path / "before", **SMALL)
    monkeypatch.setattr("clipgraft.search.sources.os.scandir", scandir)
    encode_folder(clip, pictures, tmp_path / "out", **SMALL)
    assert "Permission denied" in read_errors(tmp_path / "out")["b"]
    assert len(read_encoded(tmp_path / "out")) == 14
    result = encode_folder(clip, pictures, tmp_path / "before", **SMALL)
    assert (result.removed, result.rows) == (0, GOOD)


def test_names_that_are_no_text(clip: Clip, pictures: Path, tmp_path: Path) -> None:
    """A file name in an old encoding would end the run with a UnicodeEncodeError."""
    try:
        os.rename(pictures / "00.png", os.fsencode(pictures) + b"/\xe9.png")  # noqa: PTH104
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    encode_folder(clip, pictures, tmp_path / "out", **SMALL)
    assert [key for key, why in read_errors(tmp_path / "out").items() if "not UTF-8" in why] == [
        "\\udce9.png"
    ]


def test_turned_photos_have_upright_sizes(clip: Clip, tmp_path: Path) -> None:
    """A filter on width would take the height of every photo from a phone held upright."""
    (tmp_path / "in").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (400, 200)).save(tmp_path / "in" / "x.jpg", exif=exif)
    encode_folder(clip, tmp_path / "in", tmp_path / "out", **SMALL)
    (row,) = pq.read_table(tmp_path / "out/metadata/metadata_0.parquet").to_pylist()
    assert (row["width"], row["height"]) == (200, 400)


@pytest.mark.parametrize("progress", [None, False])
def test_progress_is_silent_where_nobody_looks(
    clip: Clip, pictures: Path, tmp_path: Path, progress: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """`progress=False` was a TypeError after the first batch, and a log file would be full of bars."""
    encode_folder(clip, pictures, tmp_path / "out", progress=progress, **SMALL)
    assert capfd.readouterr() == ("", "")


def test_images_inside_files(clip: Clip, tmp_path: Path) -> None:
    """Tables whose images lie in Parquet or tar files would be listed as missing files."""
    import pyarrow as pa

    from tar_shards import write_tar

    pictures = [write_picture(tmp_path / "in" / f"{number}.png", number) for number in range(3)]
    content = [picture.read_bytes() for picture in pictures]
    pq.write_table(pa.table({"image": content, "caption": list("abc")}), tmp_path / "t.parquet")
    write_tar(tmp_path / "x.tar", [(f"{number}.png", data) for number, data in enumerate(content)])
    (tmp_path / "t.csv").write_text("image\n" + "".join(f"x.tar/{number}.png\n" for number in range(3)))
    for source, names in (("t.parquet", "t.parquet/image/{}"), ("t.csv", "x.tar/{}.png")):
        encode_folder(clip, tmp_path / source, tmp_path / f"{source}.out", **SMALL)
        encode_folder(clip, tmp_path / "in", tmp_path / "plain", **SMALL)
        found, plain = read_encoded(tmp_path / f"{source}.out"), read_encoded(tmp_path / "plain")
        assert list(found) == [names.format(number) for number in range(3)]
        assert np.array_equal(np.stack(list(found.values())), np.stack(list(plain.values())))


def test_options_without_effect_are_refused(clip: Clip, tmp_path: Path) -> None:
    """Who asks for a part of a folder of images would get all of it."""
    write_picture(tmp_path / "in" / "0.png", 0)
    with pytest.raises(
        cg.errors.ConfigError, match=r"`split` given, but .* is no table or data set with parts"
    ):
        encode_folder(clip, tmp_path / "in", tmp_path / "out", data=TableArgs(split="train"), **SMALL)
