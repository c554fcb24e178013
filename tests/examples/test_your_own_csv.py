"""The example of a spreadsheet, with the one that it makes and with one of the user's own."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest

import clipgraft as cg


def recall(printed: str, name: str) -> tuple[float, float]:
    """A metric before and after, in percent."""
    found = re.search(rf"{re.escape(name)} +([\d.]+)% -> ([\d.]+)%", printed)
    assert found is not None
    return float(found[1]), float(found[2])


def test_it_gets_through_a_messy_spreadsheet(
    program: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One lost or damaged picture in the table stops everything, or is passed over in silence."""
    program("your_own_csv").main(["--out", str(tmp_path), "--scenes", "40", "--epochs", "1"])
    printed = capsys.readouterr().out
    for fact, count in {
        "images": 40,
        "captions": 200,
        "skipped rows": 3,
        "empty captions": 1,
        "repeated captions": 1,
        "missing images": 1,
        "unreadable images": 1,
    }.items():
        assert re.search(rf"^  {fact} +{count}\b", printed, re.M), fact
    assert "40 images encoded, 2 could not be used" in printed
    assert len(re.findall(r"^\d  \d\.\d{3}  images/test_\d+\.png  ", printed, re.M)) == 5
    (adapter,) = tmp_path.glob("run-*/adapter")
    assert cg.load(str(adapter)).source.name == "emoji"


def test_it_takes_another_table(program: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--table` and the two keys are not what is read."""
    cg.emoji.write_scenes(tmp_path / "photos", "val", 80, [])
    scenes = cg.emoji.EmojiScenes("val", 80)
    rows = [(scenes.captions(i)[0], f"photos/images/val_{i:05d}.png") for i in range(80)]
    with (tmp_path / "own.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("Words", "File"), *rows])
    words = ["--table", str(tmp_path / "own.csv"), "--image-key", "File", "--caption-key", "Words"]
    program("your_own_csv").main(["--out", str(tmp_path / "mine"), "--epochs", "1", *words])
    printed = capsys.readouterr().out
    assert re.search(r"^  images +80$", printed, re.M)
    assert "80 images encoded, 0 could not be used" in printed
    assert not (tmp_path / "mine" / "photos").exists()


@pytest.mark.slow
def test_the_adapter_beats_the_base_on_held_out_pictures(
    program: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The example promises an adapter for your own table, and gives one that is worse than none."""
    program("your_own_csv").main(["--out", str(tmp_path)])
    before, after = recall(capsys.readouterr().out, "text_to_image_R@1")
    assert after >= before + 5
