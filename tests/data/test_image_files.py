"""What is found in folders of images, and what is said to have been left out."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
from PIL import Image

from clipgraft import pictures
from clipgraft.data import image_files
from clipgraft.data.image_files import Listing, list_images
from clipgraft.data.reader import read_labelled, read_pairs
from clipgraft.errors import DataError
from clipgraft.pictures import HEIC_SUFFIXES, IMAGE_SUFFIXES, ImageError, open_image

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 200


def draw(path: Path, shade: int = 0, kind: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 5), (shade, 9, 40)).save(path, format=kind)
    return path


@pytest.mark.parametrize("name", ["a.jfif", "a.jpe", "a.JIF", "a.pjpeg", "a.dib", "a.tga", "a.pbm", "a.jpx"])
def test_every_suffix_that_pillow_reads(tmp_path: Path, name: str) -> None:
    """Pictures that a browser saved as .jfif would be left out of a folder."""
    draw(tmp_path / name, kind="JPEG")
    assert [path.name for path in list_images(tmp_path)] == [name]


@pytest.fixture
def _without_heic(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where pillow-heif is not installed."""
    monkeypatch.setattr(image_files, "IMAGE_SUFFIXES", IMAGE_SUFFIXES - HEIC_SUFFIXES)


@pytest.mark.usefixtures("_without_heic")
def test_numbers_add_up_to_the_files_of_the_folder(tmp_path: Path) -> None:
    """Pictures would be lost without a word: HEIC of phones, files without a suffix, hidden ones."""
    for name in ("a.jpg", "sub/b.png", "._a.jpg", ".trash/c.png", "README"):
        draw(tmp_path / name, kind="PNG")
    for number in range(2):
        (tmp_path / f"IMG_{number}.HEIC").write_bytes(HEIC)
    listing = Listing()
    assert [path.name for path in list_images(tmp_path, listing)] == ["a.jpg", "b.png"]
    assert listing.images + listing.other.total() == 6
    first, second = listing.notes()
    assert first.startswith("6 files: 2 images, 2 .heic, 1 ")
    assert "pip install 'clipgraft[heic]'" in first
    assert second == "1 hidden folders were left out"


def test_linked_folders(tmp_path: Path) -> None:
    """Photos on another disk, linked into the folder, would be left out; a link back would hang."""
    root = tmp_path / "data"
    draw(root / "own.jpg")
    draw(root / "real/a.jpg")
    draw(tmp_path / "disk/b.jpg")
    (root / "train").symlink_to(tmp_path / "disk")
    (tmp_path / "disk/back").symlink_to(root)
    (root / "again").symlink_to(root / "real")
    (root / "up").symlink_to("/")
    (root / "itself").symlink_to(root / "itself")
    (root / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    listing = Listing()
    found = [path.relative_to(root).as_posix() for path in list_images(root, listing)]
    assert found == ["gone.jpg", "own.jpg", "real/a.jpg", "train/b.jpg"]
    _, followed, circular = listing.notes()
    assert followed == f"1 linked folders were read too (train -> {tmp_path / 'disk'})"
    assert circular.startswith("3 links lead to a folder that is listed already or lies above: left out (")


def test_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All images below a folder without permission would be missing in silence."""
    from clipgraft.data import image_files as module

    draw(tmp_path / "a.jpg")
    draw(tmp_path / "shut/b.jpg")
    real = module.os.scandir

    def scandir(path: Path):  # type: ignore[no-untyped-def]
        if path.name == "shut":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(module.os, "scandir", scandir)
    listing = Listing()
    assert [path.name for path in list_images(tmp_path, listing)] == ["a.jpg"]
    assert listing.notes()[-1] == "1 folders cannot be listed: left out (shut)"
    with pytest.raises(DataError, match="cannot be listed"):
        list_images(tmp_path / "shut")


@pytest.mark.usefixtures("_without_heic")
def test_readers_say_what_they_left(tmp_path: Path) -> None:
    """A data set would shrink by its HEIC photos and linked folders, and its summary not tell."""
    draw(tmp_path / "pairs/a.jpg").with_suffix(".txt").write_text("a dog")
    (tmp_path / "pairs/b.heic").write_bytes(HEIC)
    report = read_pairs(tmp_path / "pairs").report
    assert report.notes[0].startswith("3 files: 1 images, 1 .heic, 1 .txt (pip install")
    draw(tmp_path / "classes/cat/a.jpg", 1)
    draw(tmp_path / "disk/b.jpg", 2)
    (tmp_path / "classes/dog").symlink_to(tmp_path / "disk")
    data = read_labelled(tmp_path / "classes")
    labels = data.report
    assert data.classes == ("cat", "dog")
    assert labels.notes[:1] == ("2 files: 2 images",)


def test_heic_without_and_with_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A photo of a phone, even under the name .jpg, would be called damaged."""
    path = tmp_path / "IMG_0001.jpg"
    path.write_bytes(HEIC)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    pictures._read_heic.cache_clear()
    for source in (path, HEIC):
        with pytest.raises(ImageError, match=r"is a HEIC photo; pip install 'clipgraft\[heic\]'"):
            open_image(source)
    pictures._read_heic.cache_clear()
    fake = types.ModuleType("pillow_heif")

    def register() -> None:
        monkeypatch.setattr(Image, "open", lambda _: Image.new("RGB", (3, 2), "red"))

    fake.register_heif_opener = register  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pillow_heif", fake)
    assert open_image(path).size == (3, 2)
    pictures._read_heic.cache_clear()
    assert ".jpg" in IMAGE_SUFFIXES
