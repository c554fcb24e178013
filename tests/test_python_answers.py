"""What Python answers in a notebook: short prints, one convention for progress, pictures as they come."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import clipgraft as cg
from clipgraft.progress import counting, showing

PAIRS = cg.Pairs(tuple(Path(f"{i}.png") for i in range(400)), tuple((f"a {i}", f"b {i}") for i in range(400)))


def test_pairs_print_slice_and_iterate() -> None:
    """Printing a data set filled the screen with paths, and the first hundred could not be taken."""
    assert repr(PAIRS) == "Pairs(400 images, 800 captions)"
    assert PAIRS[5] == (Path("5.png"), ("a 5", "b 5"))
    assert (len(PAIRS[:100]), PAIRS[-1][0], PAIRS[:2].captions) == (100, Path("399.png"), PAIRS.captions[:2])
    assert [path for path, _ in PAIRS[:2]] == [Path("0.png"), Path("1.png")]
    assert {name: len(column) for name, column in PAIRS.to_dict().items()} == {"filepath": 800, "title": 800}


def test_hits_are_flat_rows() -> None:
    """A DataFrame of hits had one column of dicts."""
    hit = cg.search.Hit(1, 0.5, "a.png", "một\ncon mèo", {"path": "a.png", "width": 3})
    assert hit.to_dict() == {"path": "a.png", "width": 3, "rank": 1, "score": 0.5}
    assert repr(hit) == "Hit(1, 0.5000, a.png 'một | con mèo')"


def test_only_public_names_are_listed() -> None:
    """Completion offered `importlib` and `annotations`."""
    assert dir(cg) == sorted(cg.__all__)


@pytest.mark.parametrize("progress", [None, False])
def test_progress_is_silent_where_nobody_looks(progress: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """A log file would be full of bars."""
    with showing(progress, "x") as told:
        advance = counting(told, 2)
        if advance is not None:
            advance(1)
    assert capfd.readouterr() == ("", "")


def test_progress_calls_and_refuses() -> None:
    """`progress=False` was a TypeError deep inside, and "no" would be one now."""
    seen: list[tuple[int, int]] = []
    with showing(lambda done, total: seen.append((done, total)), "x") as told:
        advance = counting(told, 5)
        assert advance is not None
        advance(2)
        advance(3)
    assert seen == [(2, 5), (5, 5)]
    with pytest.raises(cg.errors.ConfigError, match="progress: got 'no', allowed is None, True, False"):
        showing("no", "x").__enter__()  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def clip() -> cg.Clip:
    """The embedded base."""
    return cg.load("emoji")


def test_a_model_prints_on_a_line(clip: cg.Clip) -> None:
    """Printing a Clip printed every module of it."""
    assert repr(clip).startswith("Clip(emoji, ")
    assert len(repr(clip)) < 120


def test_pictures_are_encoded_as_they_come(clip: cg.Clip, tmp_path: Path) -> None:
    """Whoever has a path had to know preprocessing, batches and tensors first."""
    picture = Image.effect_noise((80, 60), 90).convert("RGB")
    picture.save(tmp_path / "a.png")
    with torch.no_grad():
        once = clip.encode_image(clip.require_preprocess()(picture)[None], normalize=True)
        given: list[Any] = [picture, np.asarray(picture), tmp_path / "a.png", str(tmp_path / "a.png")]
        for each in given:
            torch.testing.assert_close(clip.encode_image(each, normalize=True), once)
        assert clip.encode_image(given).shape == (4, once.shape[1])
    with pytest.raises(cg.errors.DataError, match=r"nowhere\.png"):
        clip.encode_image("nowhere.png")
    with pytest.raises(cg.errors.DataError, match="no image to encode"):
        clip.encode_image([])
    with pytest.raises(cg.errors.DataError, match="uint8"):
        clip.encode_image(np.zeros((3, 3)))


def test_a_model_in_memory_is_inspected(clip: cg.Clip) -> None:
    """`cg.profile.inspect(clip)` was an OSError: File name too long."""
    by_name, found = cg.profile.inspect("emoji"), cg.profile.inspect(clip)
    assert (found.profile.parameters, found.sites) == (by_name.profile.parameters, by_name.sites)
    assert cg.profile.inspect(clip.model).profile.parameters == by_name.profile.parameters  # type: ignore[arg-type]
    cg.apply_lora(clip, r=2, targets="text-attention")
    assert cg.profile.inspect(clip).profile.parameters == by_name.profile.parameters


def test_evaluation_takes_no_progress(clip: cg.Clip, tmp_path: Path) -> None:
    """The same argument meant another thing in `fit`."""
    pairs = cg.read_pairs(cg.emoji.write_scenes(tmp_path, "train", 6, ["vi"])["vi"], progress=False)
    report = pairs.report
    assert len(repr(report).splitlines()) < 20
    seen: list[tuple[int, int]] = []
    told: Callable[[int, int], None] = lambda done, total: seen.append((done, total))  # noqa: E731
    quiet = cg.evaluate_retrieval(clip, pairs, workers=0, progress=False)
    assert cg.evaluate_retrieval(clip, pairs, workers=0, progress=told) == quiet
    assert seen[-1] == (6, 6)
