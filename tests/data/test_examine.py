"""Looking at pairs before training: lengths, near-duplicates, odd pairs, and parts without leaks."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import clipgraft as cg
from clipgraft.data.contact_sheet import write_contact_sheet
from clipgraft.data.examine import caption_lengths, joined, near_duplicates, oddest_pairs, same_files
from clipgraft.data.splitting import split_pairs, write_parts
from clipgraft.errors import ConfigError, DataError
from tiny_pictures import write_pictures


def made_up(count: int) -> cg.Pairs:
    return cg.Pairs(
        tuple(Path(f"{i}.jpg") for i in range(count)), tuple((f"words {i}", "more") for i in range(count))
    )


def test_words_are_counted() -> None:
    """The summary of lengths is of something else than the captions."""
    captions = [" ".join("w" * n) for n in (1, 2, 3, 4, 40)]
    pairs = cg.Pairs(tuple(Path(f"{i}") for i in range(5)), tuple((text,) for text in captions))
    found = caption_lengths(pairs)
    assert (found.fewest, found.median, found.most) == (1, 3, 40)


def test_images_that_are_alike_are_grouped_through_others() -> None:
    """A burst of photos of one scene counts as several groups, and leaks from one part into another."""
    angles = torch.tensor([0.0, 0.1, 0.2, 1.5, 3.0, 3.05])
    features = torch.stack([angles.cos(), angles.sin()], 1)
    assert near_duplicates(features, 0.99) == [(0, 1, 2), (4, 5)]
    assert near_duplicates(features, 0.9999) == []


@given(st.integers(1, 30), st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=40))
def test_groups_are_connected_components(count: int, links: list[tuple[int, int]]) -> None:
    """Two images that are linked come into different groups."""
    links = [(a % count, b % count) for a, b in links]
    reach = torch.eye(count)
    for a, b in links:
        reach[a, b] = reach[b, a] = 1
    reach = torch.matrix_power(reach, count) > 0
    wanted = {tuple(row.nonzero().squeeze(1).tolist()) for row in reach}
    assert set(joined(count, links)) == {group for group in wanted if len(group) > 1}


def test_the_oddest_pairs_come_first() -> None:
    """A caption of another picture is not found among thousands."""
    images = torch.eye(3)
    captions = torch.nn.functional.normalize(torch.eye(3).repeat_interleave(2, 0) + 0.1, dim=1)
    captions[3] = images[0]
    found = oddest_pairs(made_up(3), images, captions, 2)
    assert (found[0].image.name, found[0].caption, found[0].similarity) == ("1.jpg", "more", 0.0)
    assert len(found) == 2


@settings(max_examples=50)
@given(
    st.integers(3, 60),
    st.lists(st.lists(st.integers(0, 59), min_size=2, max_size=4), max_size=6),
    st.sampled_from([(80, 10, 10), (0.5, 0.5), (1, 1, 1)]),
    st.integers(0, 5),
)
def test_parts_hold_everything_once_and_share_nothing(
    count: int, alike: list[list[int]], shares: tuple[float, ...], seed: int
) -> None:
    """Validation data hold images of the training data, or images are lost."""
    pairs = made_up(count)
    groups = joined(count, [[number % count for number in group] for group in alike])
    if count - sum(len(group) - 1 for group in groups) < len(shares):
        return
    parts = split_pairs(pairs, shares, groups, seed)
    places = {path: part for part, own in enumerate(parts) for path in own.images}
    assert sorted(places) == sorted(pairs.images)
    assert sum(map(len, parts)) == count
    assert all(len({places[pairs.images[i]] for i in group}) == 1 for group in groups)
    assert all(len(part) for part in parts)
    largest = max([1, *map(len, groups)])
    for share, part in zip(shares, parts, strict=True):
        assert abs(len(part) - count * share / sum(shares)) <= largest + len(shares)
    again = split_pairs(pairs, shares, groups, seed)
    assert [part.images for part in again] == [part.images for part in parts]


def test_parts_are_read_back_as_they_were(tmp_path: Path) -> None:
    """The tables that `--split` writes name no image, or other captions."""
    pairs = cg.read_pairs(write_pictures(tmp_path / "pictures"))
    paths = write_parts(split_pairs(pairs, (6, 3, 3)), tmp_path / "parts" / "new")
    assert [path.name for path in paths] == ["train.csv", "val.csv", "test.csv"]
    read = [cg.read_pairs(path) for path in paths]
    assert [len(part) for part in read] == [6, 3, 3]
    before = {path.resolve(): texts for path, texts in pairs}
    assert {path.resolve(): texts for part in read for path, texts in part} == before
    with paths[0].open(newline="", encoding="utf-8") as file:
        assert not Path(next(csv.DictReader(file))["filepath"]).is_absolute()
    with pytest.raises(ConfigError, match="there already"):
        write_parts(split_pairs(pairs, (1, 1)), tmp_path / "parts" / "new")


def test_equal_files_stay_together(tmp_path: Path) -> None:
    """A picture that was copied under another name is in training and test data."""
    table = write_pictures(tmp_path)
    (tmp_path / "copy.png").write_bytes((tmp_path / "3.png").read_bytes())
    with table.open("a", encoding="utf-8") as file:
        file.write("copy.png,thing 3 again\n")
    pairs = cg.read_pairs(table)
    (group,) = same_files(pairs)
    assert {pairs.images[i].name for i in group} == {"3.png", "copy.png"}


def test_too_few_images_are_refused() -> None:
    """A part without an image is written, and training fails on it later."""
    with pytest.raises(DataError, match="2 images that differ cannot be split into 3 parts"):
        split_pairs(made_up(4), (8, 1, 1), [(0, 1, 2)])
    with pytest.raises(ConfigError, match="two or three numbers above 0"):
        split_pairs(made_up(4), (1, 0))


def test_a_contact_sheet_shows_the_pictures(tmp_path: Path) -> None:
    """The sheet has other pictures than the table, or none."""
    Image.new("RGB", (300, 100), (255, 0, 0)).save(tmp_path / "red.png")
    Image.new("RGB", (40, 80), (0, 0, 255)).save(tmp_path / "blue.png")
    pairs = cg.Pairs((tmp_path / "red.png", tmp_path / "blue.png"), (("một màu đỏ",), ("blue " * 50,)))
    with Image.open(write_contact_sheet(pairs, tmp_path / "sheet.png")) as sheet:
        colours = {colour for _, colour in sheet.getcolors(1 << 20) or ()}
    assert {(255, 0, 0), (0, 0, 255)} <= colours
