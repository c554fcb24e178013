"""A run and a sweep of each task on a tiny base and tiny pictures, made once, and pages made of them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from clipgraft.cli import main
from clipgraft.emoji.classes import write_classes
from html_pages import Page, read_page
from tiny_pictures import write_pictures

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")


@dataclass(frozen=True)
class World:
    """Folders of runs that have been made; read only."""

    logs: Path
    table: Path
    run: Path
    sweep: Path
    classes: Path
    class_sweep: Path
    few: Path

    @property
    def all(self) -> list[Path]:
        return [self.run, self.sweep, self.classes, self.class_sweep, self.few]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_config: Path) -> Iterator[World]:
    """`train` and `sweep` as a newcomer would run them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("báo cáo")
    logs, table = root / "logs", write_pictures(root / "pictures")
    images = write_classes(root / "classes", "train", 2)
    base = ["--model", str(tiny_config), "--pretrained", "none", "--precision", "fp32"]
    base += ["--feature-cache", "none", "--workers", "0", "--logs", str(logs), "--lr", "1e-3"]
    pairs = ["--train-data", str(table), "--val-data", str(table), "--batch-size", "8"]
    labels = ["--task", "classification", "--train-data", str(images), "--val-size", "0.5"]
    labels += ["--batch-size", "25", "--epochs", "1"]
    lora = ["--use-lora", "--lora-r", "2", "--save-lora-only"]
    grid = ["--lora-r", "1,2", "--epochs", "1"]
    for words in (
        ["train", *base, *pairs, *lora, "--epochs", "2", "--name", "run"],
        ["sweep", *base, *pairs, *grid, "--targets", "text-attention;vision.1.*", "--seeds", "2"],
        [
            "train",
            *base,
            *labels,
            *lora,
            "--lora-targets",
            "vision.1.*",
            "--head",
            "linear",
            "--name",
            "kinds",
        ],
        [
            *("sweep", *base, *labels, "--targets", "vision.1.*", "--lora-r", "1", "--no-full"),
            *("--seeds", "2", "--test-data", str(images), "--name", "grid"),
        ],
        [
            *("fewshot", "--model", str(tiny_config), "--pretrained", "none", "--precision", "fp32"),
            *("--workers", "0", "--train-data", str(images), "--test-data", str(images), "--views", "1"),
            *("--shots", "1,2", "--seeds", "2", "--modes", "prolip,tip-adapter", "--feature-epochs", "2"),
            *("--setting", "base-to-novel", "--out", str(logs / "few")),
        ],
    ):
        assert main(words) == 0
    yield World(logs, table, logs / "run", logs / "sweep", logs / "kinds", logs / "grid", logs / "few")
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def page(world: World, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The page on all of them, with what was forgotten."""
    out = tmp_path_factory.mktemp("pages") / "report.html"
    words = ["report", *map(str, world.all), "--out", str(out), "--retained", str(world.table)]
    assert main([*words, "--workers", "0", "--feature-cache", "none", "--device", "cpu"]) == 0
    return read_page(out)


@pytest.fixture
def copied(world: World, tmp_path: Path) -> Path:
    """A copy of the plain run, to be damaged."""
    return Path(shutil.copytree(world.run, tmp_path / "logs" / "run"))
