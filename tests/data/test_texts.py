"""Texts from tables and from plain files."""

from __future__ import annotations

from pathlib import Path

import pytest

from clipgraft.data.texts import read_texts
from clipgraft.errors import DataError


def test_plain_lines(tmp_path: Path) -> None:
    """Words of a corpus that is no table are taken for columns, or lost."""
    path = tmp_path / "a.txt"
    path.write_bytes("﻿image, caption\r\n\r\n một con chó \r\nmột con chó\r\n".encode())
    assert read_texts(path) == ("image, caption", "một con chó")


def test_tables(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Captions of a table are not found unless its images are there, too."""
    caplog.set_level("INFO", "clipgraft")
    table = tmp_path / "a.csv"
    table.write_text("filepath\ttitle\nnot-there.jpg\ta dog\nb.jpg\t\nc.jpg\ta dog\nd.jpg\ta cat\n")
    assert read_texts(table) == ("a dog", "a cat")
    assert "1 lines without a text were skipped" in caplog.text
    flickr = tmp_path / "b.txt"
    flickr.write_text("1.jpg#0\ta dog\n1.jpg#1\ta cat\n")
    assert read_texts(flickr) == ("a dog", "a cat")
    listed = tmp_path / "c.txt"
    listed.write_text("picture;words\n1.jpg;a dog\n")
    assert read_texts(listed, image_key="picture", caption_key="words", separator=";") == ("a dog",)
    assert read_texts(listed) == ("picture;words", "1.jpg;a dog")


def test_nothing_to_read(tmp_path: Path) -> None:
    """An empty corpus gives a model that knows no word, without a word said."""
    (tmp_path / "a.txt").write_text(" \n\n")
    with pytest.raises(DataError, match="holds no text"):
        read_texts(tmp_path / "a.txt")
    with pytest.raises(DataError, match="not found"):
        read_texts(tmp_path / "b.txt")
