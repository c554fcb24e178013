"""`clipgraft data`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import clipgraft as cg
from tiny_pictures import write_pictures


def test_a_table_is_looked_at_and_split(cli: Any, tmp_path: Path, tiny_config: Path) -> None:
    """A newcomer cannot see what is in a table, or gets parts that training refuses."""
    table = write_pictures(tmp_path)
    done = cli(
        *(
            "data",
            table,
            "--model",
            tiny_config,
            "--pretrained",
            "none",
            "--workers",
            "0",
            "--near",
            "0.999999",
        ),
        *("--feature-cache", "none", "--split", "50/25/25", "--out", tmp_path / "parts", "--odd", "3"),
        *("--contact-sheet", tmp_path / "sheet.jpg"),
    )
    assert done.code == 0, done.err
    assert "Lengths of captions" in done.out
    assert "No two images are nearly the same" in done.out
    assert "Pairs that the base finds least similar" in done.out
    assert "12 images of 12 are in a part" in done.out
    assert [len(cg.read_pairs(tmp_path / "parts" / f"{name}.csv")) for name in ("train", "val", "test")] == [
        6,
        3,
        3,
    ]
    assert (tmp_path / "sheet.jpg").stat().st_size > 5000


def test_without_a_base_it_says_what_was_not_looked_for(cli: Any, tmp_path: Path) -> None:
    """Silence looks as if there were no duplicates."""
    done = cli("data", write_pictures(tmp_path))
    assert done.code == 0, done.err
    assert (
        "not looked for: images that are nearly the same, and odd pairs; a base finds them: add --model"
        in done.out
    )


def test_contradictions(cli: Any, tmp_path: Path) -> None:
    """Flags without effect are taken, or a fault comes after minutes of encoding."""
    table = write_pictures(tmp_path)
    done = cli("data", table, "--split", "80/20", "--near", "0.9", "--contact-sheet", tmp_path / "a.gif")
    assert done.code == 2
    assert "--split and --out go together" in done.err
    assert "--near: needs a base, add --model" in done.err
    assert "a.gif: name a .jpg or .png" in done.err
    assert "such as 80/10/10" in cli("data", table, "--split", "80/0", "--out", tmp_path / "parts").err
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "train.csv").write_text("mine")
    done = cli("data", table, "--split", "80/20", "--out", tmp_path / "parts")
    assert (done.code, (tmp_path / "parts" / "train.csv").read_text()) == (2, "mine")
    assert "train.csv: there already; name another --out, or add --overwrite" in done.err
