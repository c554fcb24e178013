"""Tar files in WebDataset's layout as a source."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import clipgraft as cg
from clipgraft.data import image_files
from clipgraft.models.clip import Clip
from clipgraft.search.archives import expand_braces, open_archives
from clipgraft.search.encode import encode_folder
from encoded_folders import read_encoded, read_errors, write_picture

SMALL = {"batch_size": 4, "shard_rows": 6, "workers": 0, "autocast": False}


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Two archives of three samples as WebDataset writes them, captions beside the images."""
    import webdataset

    for archive in range(2):
        with webdataset.TarWriter(str(tmp_path / f"d-{archive:02d}.tar")) as writer:
            for sample in range(3):
                number = 3 * archive + sample
                picture = write_picture(tmp_path / "loose" / f"{number}.png", number)
                content = {"png": picture.read_bytes(), "txt": f"ảnh {number}", "json": {"n": number}}
                writer.write({"__key__": f"{number:04d}", **content})
    return tmp_path


def test_archives_equal_the_loose_files(clip: Clip, tars: Path, tmp_path: Path) -> None:
    """A data set in WebDataset's form would have to be unpacked, or lose its captions."""
    out = tmp_path / "out"
    encode_folder(clip, str(tars / "d-{00..01}.tar"), out, **SMALL)
    encode_folder(clip, tars / "loose", tmp_path / "plain", **SMALL)
    found, plain = read_encoded(out), read_encoded(tmp_path / "plain")
    assert list(found) == [f"d-0{n // 3}.tar::{n:04d}.png" for n in range(6)]
    assert np.array_equal(np.stack(list(found.values())), np.stack(list(plain.values())))
    rows = pq.read_table(out / "metadata/metadata_0.parquet").to_pylist()
    assert [row["caption"] for row in rows] == [f"ảnh {n}" for n in range(6)]
    assert rows[0]["bytes"] == (tars / "loose" / "0.png").stat().st_size


def test_an_archive_more(clip: Clip, tars: Path, tmp_path: Path) -> None:
    """The next day's archive would cost all days before it."""
    encode_folder(clip, str(tars / "d-00.tar"), tmp_path / "out", **SMALL)
    result = encode_folder(clip, str(tars / "*.tar"), tmp_path / "out", **SMALL)
    assert (result.encoded, result.kept, result.removed) == (3, 3, 0)


def test_an_archive_that_is_cut_short(clip: Clip, tars: Path, tmp_path: Path) -> None:
    """One bad download would end the run, or lose the images before the cut."""
    file = tars / "d-01.tar"
    with tarfile.open(file) as tar:
        last = tar.getmember("0005.png")
    with file.open("rb+") as stream:
        stream.truncate(last.offset_data + 100)
    encode_folder(clip, str(tars / "d-*.tar"), tmp_path / "out", **SMALL)
    assert len(read_encoded(tmp_path / "out")) == 5
    errors = read_errors(tmp_path / "out")
    assert set(errors) == {"d-01.tar", "d-01.tar::0005.png"}
    assert "cut short" in errors["d-01.tar"]


def test_an_archive_that_gets_cut_later(clip: Clip, tars: Path, tmp_path: Path) -> None:
    """A copy that is under way would take away the rows of what is not there yet."""
    encode_folder(clip, str(tars / "d-*.tar"), tmp_path / "out", **SMALL)
    (tars / "d-01.tar").write_bytes(b"")
    result = encode_folder(clip, str(tars / "d-*.tar"), tmp_path / "out", **SMALL)
    assert (result.removed, result.rows, result.errors) == (0, 6, 1)


def test_what_is_no_archive(clip: Clip, tars: Path, tmp_path: Path) -> None:
    """An HTML error page under the name of a tar would end the run."""
    (tars / "d-02.tar").write_text("<html>404</html>")
    encode_folder(clip, str(tars / "d-*.tar"), tmp_path / "out", **SMALL)
    assert len(read_encoded(tmp_path / "out")) == 6
    assert set(read_errors(tmp_path / "out")) == {"d-02.tar"}


def test_archives_at_an_address(clip: Clip, tars: Path, tmp_path: Path) -> None:
    """WebDataset's shards are usually in a bucket."""
    import fsspec

    memory = fsspec.filesystem("memory")
    for name in ("d-00.tar", "d-01.tar"):
        memory.pipe_file(f"/tars/{name}", (tars / name).read_bytes())
    encode_folder(clip, "memory://tars/d-{00..01}.tar", tmp_path / "out", **SMALL)
    encode_folder(clip, str(tars / "d-{00..01}.tar"), tmp_path / "local", **SMALL)
    remote, local = read_encoded(tmp_path / "out"), read_encoded(tmp_path / "local")
    assert list(remote) == list(local)
    assert np.array_equal(np.stack(list(remote.values())), np.stack(list(local.values())))


def test_headers_are_not_kept(tmp_path: Path) -> None:
    """Listing an archive of a million members would hold a million headers."""
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for number in range(5):
            info = tarfile.TarInfo(f"{number}.jpg")
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    held: list[int] = []
    real = tarfile.TarFile.next

    def next_member(self: tarfile.TarFile) -> tarfile.TarInfo | None:
        held.append(len(self.members))  # type: ignore[attr-defined]
        return real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tarfile.TarFile, "next", next_member)
        items = list(open_archives(str(tmp_path / "x.tar")).items())
    assert [item.key for item in items] == [f"x.tar::{number}.jpg" for number in range(5)]
    assert max(held) <= 1


def made(path: Path, *members: str) -> list[tuple[str, str | None]]:
    """(key, caption) of the images of an archive; a member `a.txt=words` is a caption."""
    with tarfile.open(path, "w") as tar:
        for member in members:
            name, _, words = member.partition("=")
            info = tarfile.TarInfo(name)
            info.size = len(words.encode())
            tar.addfile(info, io.BytesIO(words.encode()))
    source = open_archives(str(path))
    captions: dict[str, str | None] = {}
    for item in source.items():
        captions[item.key.partition("::")[2]] = item.caption or captions.get(item.key.partition("::")[2])
    assert source.met()[0].startswith(f"in the archives {len(members)} files: ")
    return list(captions.items())


def said(path: Path) -> str:
    """What is said after an archive was listed."""
    source = open_archives(str(path))
    list(source.items())
    return " | ".join(source.met())


def test_two_images_of_one_name(tmp_path: Path) -> None:
    """Two shards written one behind the other: captions of two images on one, and the other image lost."""
    tar = tmp_path / "x.tar"
    assert made(tar, "0.jpg", "0.txt=a", "1.jpg", "1.txt=b", "0.jpg", "0.txt=c", "1.jpg") == [
        ("0.jpg", "a"),
        ("1.jpg", "b"),
        ("0.jpg::2", "c"),
        ("1.jpg::2", None),
    ]
    assert "2 images have the same name as one before them" in said(tar)
    assert made(tar, "0.txt=a", "0.jpg", "0.txt=b", "0.jpg") == [("0.jpg", "a"), ("0.jpg::2", "b")]


@pytest.mark.parametrize(
    "members",
    [
        ("0.jpg", "0.jpg", "0.txt=a", "0.txt=b"),
        ("0.jpg", "1.jpg", "0.jpg", "0.txt=a", "1.txt=c", "0.txt=b"),
        ("0.jpg", "1.jpg", "0.jpg", "1.txt=c", "0.txt=b"),
    ],
)
def test_no_caption_rather_than_a_doubtful_one(tmp_path: Path, members: tuple[str, ...]) -> None:
    """An image would get the caption of another image that has its name."""
    captions = dict(made(tmp_path / "x.tar", *members))
    assert captions["0.jpg"] is None
    assert captions.get("1.jpg") in (None, "c")
    assert "captions left out:" in said(tmp_path / "x.tar")


@pytest.mark.parametrize(
    ("members", "captions"),
    [
        (
            ["im.0.jpg", "im.0.txt=a", "im.1.jpg", "im.1.txt=b", "im.2.jpg"],
            {"im.0.jpg": "a", "im.1.jpg": "b", "im.2.jpg": None},
        ),
        (["0.left.jpg", "0.right.png", "0.txt=a"], {"0.left.jpg": "a", "0.right.png": "a"}),
        (["0.jpg", "0.caption.txt=a"], {"0.jpg": "a"}),
        (["d/0.jpg", "d/0.caption.txt=a", "e/0.jpg"], {"d/0.jpg": "a", "e/0.jpg": None}),
        (["im.jpg", "im.0.jpg", "im.0.txt=a"], {"im.jpg": None, "im.0.jpg": "a"}),
        (["a.jpg", "a.jpg.txt=a", "a.png", "a.png.txt=b"], {"a.jpg": "a", "a.png": "b"}),
        (["v1.2/a.jpg", "v1.2/a.txt=a"], {"v1.2/a.jpg": "a"}),
        (["0.jpg", "1.jpg", "1.txt=b", "0.txt=a"], {"0.jpg": "a", "1.jpg": "b"}),
        (["0.txt=a", "1.txt=b", "2.txt=c", "1.jpg", "0.jpg"], {"0.jpg": "a", "1.jpg": "b"}),
        (["im.1.txt=b", "x.jpg", "im.0.jpg", "im.1.jpg"], {"im.0.jpg": None, "im.1.jpg": "b", "x.jpg": None}),
        (["0.jpg", "0.txt=nan", "1.jpg", "1.txt="], {"0.jpg": None, "1.jpg": None}),
    ],
)
def test_whose_a_caption_is(tmp_path: Path, members: list[str], captions: dict[str, str | None]) -> None:
    """Names with dots gave every image the last caption; captions apart from their images were dropped."""
    assert dict(made(tmp_path / "x.tar", *members)) == captions


def test_what_is_left_out_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captions and members of other kinds would vanish without a word."""
    monkeypatch.setattr(image_files, "IMAGE_SUFFIXES", frozenset({".jpg"}))  # whether pillow-heif is here
    tar = tmp_path / "x.tar"
    made(tar, "0.jpg", "1.txt=lost", "2.heic", "3.json={}", "4.txt=lost")
    assert said(tar).startswith("in the archives 5 files: 1 images, 2 .txt, 1 .heic, 1 .json (pip install")
    assert said(tar).endswith("captions left out: 2 without an image; the first is x.tar::1.txt")


def test_the_second_image_of_a_name_is_shown(clip: Clip, tmp_path: Path) -> None:
    """The page of a search would show another picture than the one found."""
    from clipgraft.search.archives import read_member

    pictures = [write_picture(tmp_path / f"{n}.png", n).read_bytes() for n in range(2)]
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for content in pictures:
            info = tarfile.TarInfo("a.png")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    result = encode_folder(clip, str(tmp_path / "x.tar"), tmp_path / "out", **SMALL)
    assert result.rows == 2
    for key, content in zip(("a.png", "a.png::2"), pictures, strict=True):
        assert read_member(f"{tmp_path / 'x.tar'}::{key}") == content
    with pytest.raises(cg.errors.DataError, match="is no file in the archive"):
        read_member(f"{tmp_path / 'x.tar'}::a.png::3")


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("a-{08..10}.tar", ["a-08.tar", "a-09.tar", "a-10.tar"]),
        ("{a,b}-{1..2}.tar", ["a-1.tar", "b-1.tar", "a-2.tar", "b-2.tar"]),
        ("{2..1}.tar", ["2.tar", "1.tar"]),
    ],
)
def test_braces(pattern: str, names: list[str]) -> None:
    """The usual spelling of many shards would name others."""
    assert sorted(expand_braces(pattern)) == sorted(names)
    try:
        import braceexpand
    except ImportError:
        return
    assert sorted(braceexpand.braceexpand(pattern)) == sorted(names)


@pytest.mark.parametrize(
    ("pattern", "says"),
    [("no-such.tar", "not found"), ("x-*.tar", "no file matches"), ("a.tar.gz", "is compressed")],
)
def test_wrong_patterns(tmp_path: Path, pattern: str, says: str) -> None:
    """A typing error in the pattern would look like an empty data set."""
    with pytest.raises(cg.errors.DataError, match=says):
        open_archives(str(tmp_path / pattern))
