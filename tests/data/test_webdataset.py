"""Tar files as training data: the pairs of the webdataset library, whose images are read where they lie."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipgraft import stored_images
from clipgraft.data.datasets import Pairs
from clipgraft.data.image_files import ImageFinder
from clipgraft.data.reader import read_labelled, read_pairs, read_texts
from clipgraft.data.stored_rows import file_ids
from clipgraft.errors import ConfigError, DataError
from clipgraft.pictures import ImageError, open_image
from tar_shards import write_shards, write_tar
from tiny_pictures import write_pictures


def png(value: int = 0) -> bytes:
    """A small picture of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def named(pairs: Pairs, folder: Path) -> list[tuple[str, tuple[str, ...]]]:
    """Pairs with their images as written below a folder."""
    return [(image.relative_to(folder).as_posix(), captions) for image, captions in pairs]


def test_pairs_are_those_of_the_webdataset_library(tmp_path: Path) -> None:
    """A run on shards would train on other images, or other captions, than every other program does."""
    from webdataset import tariterators

    pattern = write_shards(write_pictures(tmp_path / "loose"), tmp_path / "shards", 3)
    pairs = read_pairs(pattern)
    names = [pattern.replace("{0..2}", str(shard)) for shard in range(3)]
    with ExitStack() as files:
        streams = [{"url": name, "stream": files.enter_context(open(name, "rb"))} for name in names]  # noqa: PTH123
        theirs = list(tariterators.group_by_keys(tariterators.tar_file_expander(streams)))
    assert len(pairs) == len(theirs) == 12
    for (image, captions), sample in zip(pairs, theirs, strict=True):
        assert image.stem == sample["__key__"]
        assert list(captions) == json.loads(sample["json"])["captions"]
        assert stored_images.read_stored(image) == sample["png"]
    assert read_pairs(tmp_path / "shards") == pairs
    assert read_pairs("::".join(names)) == pairs
    assert pairs.report is not None
    assert pairs.report.kind == "webdataset, 3 tar files"
    assert pairs.report.notes == ("in the archives 24 files: 12 images, 12 .json",)
    assert read_texts(pattern) == tuple(dict.fromkeys(text for texts in pairs.captions for text in texts))


def test_captions_of_an_image(tmp_path: Path) -> None:
    """Captions in the other usual members would be lost, doubled, or joined into one."""
    members: list[tuple[str, bytes | str]] = [
        *(
            ("a.png", png(1)),
            ("a.txt", "một con\u2009mèo\n\nhai\n"),
            ("a.json", '{"caption": "hai", "url": "x"}'),
        ),
        *(("b.png", png(2)), ("b.caption", "three"), ("b.json", '{"other": 3, "top": ["x", "y"]}')),
        *(("c.png", png(3)), ("c.json", '{"width": 3}')),
        *(("d.png", png(4)), ("d.json", "[")),
        *(("e.png", png(5)), ("e.txt", "nan")),
    ]
    path = write_tar(tmp_path / "x.tar", members)
    pairs = read_pairs(path)
    assert named(pairs, tmp_path) == [("x.tar/a.png", ("một con mèo", "hai")), ("x.tar/b.png", ("three",))]
    report = pairs.report
    assert report is not None
    assert (report.rows, report.bad_rows, report.null_captions) == (5, 3, 1)
    assert ("without captions", 2) in report.reasons
    assert "captions left out: 1 not JSON; the first is x.tar::d.json" in report.notes
    assert named(read_pairs(path, csv_caption_key="top"), tmp_path) == [("x.tar/b.png", ("x", "y"))]


def test_classes_of_images(tmp_path: Path) -> None:
    """Shards of ImageNet's form, with a number in `.cls`, could not be learnt as classes."""
    members: list[tuple[str, bytes | str]] = []
    for number in range(4):
        label = ("cls", str(number % 2)) if number < 2 else ("json", json.dumps({"label": number % 2}))
        members += [(f"{number}.png", png(number)), (f"{number}.{label[0]}", label[1])]
    data = read_labelled(write_tar(tmp_path / "x.tar", members))
    assert (data.classes, data.labels) == (("0", "1"), (0, 1, 0, 1))


def test_names_in_a_tar_never_touch_the_file_system(tmp_path: Path) -> None:
    """A tar file from elsewhere would have files of this machine read, or one image taken for another."""
    (tmp_path / "secret.png").write_bytes(png(9))
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "x.tar"
    names = [
        "../../secret.png",
        str(tmp_path / "secret.png"),
        "./a.png",
        "a.png",
        "..\\..\\b.png",
        "a//c.png",
    ]
    write_tar(path, [(name, png(number)) for number, name in enumerate(names)])
    with tarfile.open(path, "a") as tar:
        for name, kind in (("link.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(tmp_path / "secret.png")
            tar.addfile(info)
    members = list(stored_images.list_tar(str(path)))
    paths = [stored_images.member_path(str(path), member.name, member.turn) for member in members]
    assert len(set(paths)) == len(names)
    assert all(os.path.normpath(name).startswith(f"{path}{os.sep}") for name in paths)
    for number, name in enumerate(paths):
        assert np.asarray(open_image(name))[0, 0, 0] == number
    for name in ("../secret.png", "../../secret.png", "link.png", "hard.png", "none.png"):
        with pytest.raises(ImageError, match="not found"):
            open_image(f"{path}/{name}")


def test_an_image_of_a_tar_is_a_file_to_everything_else(tmp_path: Path) -> None:
    """Tables could not name images in tar files; equal, empty or changed ones would pass unnoticed."""
    path = write_tar(
        tmp_path / "x.tar", [("a.png", png(1)), ("b.png", png(1)), ("c.png", png(2)), ("d.png", b"")]
    )
    table = tmp_path / "t.csv"
    table.write_text("image,caption\n" + "".join(f"x.tar/{name}.png,caption {name}\n" for name in "abcde"))
    pairs = read_pairs(table)
    report = pairs.report
    assert report is not None
    assert named(pairs, tmp_path) == [(f"x.tar/{name}.png", (f"caption {name}",)) for name in "abc"]
    assert report.duplicates == ((path / "a.png", path / "b.png"),)
    assert [bad.reason for bad in report.first_bad] == [
        "the file is empty (0 bytes)",
        f"not found in {tmp_path}",
    ]
    assert pickle.loads(pickle.dumps(pairs)) == pairs
    images = list(pairs.images)
    before = file_ids(images)
    assert len(set(before)) == 3
    assert file_ids(images) == before
    os.utime(path, ns=(1, 1))
    assert not set(file_ids(images)) & set(before), "features of the old tar file would be taken for the new"
    write_tar(path, [("b.png", png(7))])
    assert np.asarray(open_image(images[1]))[0, 0, 0] == 7
    assert ImageFinder(tmp_path).find("x.tar/a.png") == f"not found in {tmp_path}"


def test_a_tar_that_is_cut_short(tmp_path: Path) -> None:
    """One bad download would end the run in a traceback, or lose the images before the cut in silence."""
    path = write_tar(
        tmp_path / "x.tar",
        [(f"{n}.{kind}", png(n) if kind == "png" else "t") for n in range(3) for kind in ("png", "txt")],
    )
    content = path.read_bytes()
    path.write_bytes(content[: 2048 + 512 + 40])
    pairs = read_pairs(path)
    report = pairs.report
    assert report is not None
    assert named(pairs, tmp_path) == [("x.tar/0.png", ("t",))]
    assert any("damaged or cut short" in bad.reason or "cut short" in bad.reason for bad in report.first_bad)
    path.write_text("<html>404</html>")
    with pytest.raises(DataError, match=r"a web page stands in its place.*; correct them") as error:
        read_pairs(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("no.tar", "no.tar: not found; check the path"),
        ("x-{0..3}.tar", "x-0.tar: not found"),
        ("y-*.tar", "no file matches; check the pattern, in quotes where a shell would expand it"),
        ("x.tar.gz", "a compressed tar file, in which no image can be read by itself; .*: gunzip "),
    ],
)
def test_sources_that_are_no_tars(tmp_path: Path, source: str, says: str) -> None:
    """A typing error in a pattern would end in a traceback, or read other files."""
    with pytest.raises(DataError, match=says):
        read_pairs(tmp_path / source)


def test_what_tars_cannot_take(tmp_path: Path) -> None:
    """An option without effect would be ignored in silence, and an address looked for as a folder."""
    path = write_tar(tmp_path / "x.tar", [("a.png", png())])
    with pytest.raises(ConfigError, match="`image_root` given with tar files"):
        read_pairs(path, image_root=tmp_path)
    with pytest.raises(DataError, match="tar files at an address are not trained on from there"):
        read_pairs("s3://bucket/{0..3}.tar")
    with pytest.raises(DataError, match=r"has no \.txt, \.caption or \.json with a caption beside it"):
        read_pairs(path)


def test_what_img2dataset_downloaded(tmp_path: Path) -> None:
    """Who has half of the images would not be told why, nor that a tar file lacks what was downloaded."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for shard in range(2):
        members: list[tuple[str, bytes | str]] = []
        rows = []
        for number in range(4):
            key, failed = f"{shard:05d}{number:04d}", number == 3
            about = {"key": key, "caption": f"số {number}", "url": "http://x", "error_message": None}
            rows.append({**about, "status": "failed_to_download" if failed else "success"})
            if not failed and (shard, number) != (1, 2):
                members += [(f"{key}.png", png(number)), (f"{key}.txt", about["caption"] or "")]
                members += [(f"{key}.json", json.dumps(rows[-1]))]
        write_tar(tmp_path / f"{shard:05d}.tar", members)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{shard:05d}.parquet")
        (tmp_path / f"{shard:05d}_stats.json").write_text("{}")
    pairs = read_pairs(tmp_path)
    assert [texts for _, texts in pairs] == [(f"số {number}",) for number in (0, 1, 2, 0, 1)]
    assert pairs.report is not None
    assert pairs.report.notes[1:] == (
        "img2dataset's record has 8 downloads: 6 success, 2 failed_to_download",
        "1 images that came are in no tar file, such as 000010002: download their tar file again",
    )
    (tmp_path / "00000.parquet").write_bytes(b"damaged")
    notes = read_pairs(tmp_path).report
    assert notes is not None
    assert "img2dataset's record was not read" in notes.notes[-1]


def test_parquet_that_img2dataset_wrote(tmp_path: Path) -> None:
    """Its images in Parquet would have to be asked for by column, and failed downloads counted as damage."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for shard in range(2):
        rows = []
        for number in range(4):
            failed = number == 3
            about = {"url": "http://x", "key": f"{shard:05d}{number:04d}", "caption": f"số {number}"}
            about |= {"status": "failed_to_resize" if failed else "success", "error_message": "e"}
            rows.append(
                {**about, "jpg": None if failed else b"" if (shard, number) == (1, 2) else png(number)}
            )
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{shard:05d}.parquet")
        (tmp_path / f"{shard:05d}_stats.json").write_text("{}")
    pairs = read_pairs(tmp_path)
    assert [texts for _, texts in pairs] == [(f"số {number}",) for number in (0, 1, 2, 0, 1)]
    assert pairs.report is not None
    assert pairs.report.notes[-1] == "img2dataset's record has 8 downloads: 6 success, 2 failed_to_resize"
    assert (pairs.report.rows, pairs.report.unreadable_images) == (6, 1)
    pq.write_table(
        pa.table({"key": ["a"], "status": ["approved"], "jpg": [png(1)]}), tmp_path / "own.parquet"
    )
    with pytest.raises(DataError, match='no column "caption"'):
        read_pairs(tmp_path)
