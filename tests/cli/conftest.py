"""The command line in this process, on a tiny base and a dozen pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from clipgraft.cli import main
from tiny_pictures import write_pictures


@dataclass(frozen=True)
class Outcome:
    """What a command gave: its exit code and what it printed."""

    code: int
    out: str
    err: str


Cli = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads cost tiny models far more than they bring, most of all beside other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run `clipgraft WORDS…`."""

    def run(*words: object) -> Outcome:
        capsys.readouterr()
        code = main([str(word) for word in words])
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV of 12 images and 24 captions in a folder with a Vietnamese name. Read only."""
    return write_pictures(tmp_path_factory.mktemp("cli") / "ảnh của tôi")


@pytest.fixture
def base(tiny_config: Path) -> list[str]:
    """Flags of a tiny open_clip base with fixed random weights, the same bits on every machine."""
    return ["--model", str(tiny_config), "--pretrained", "none", "--precision", "fp32"]


@pytest.fixture
def train(cli: Cli, base: list[str], table: Path, tmp_path: Path) -> Cli:
    """`clipgraft train` for one epoch of three steps, with more flags."""

    def run(*words: object) -> Outcome:
        flags = [
            "--train-data",
            table,
            "--logs",
            tmp_path / "logs",
            "--batch-size",
            8,
            "--epochs",
            1,
            "--workers",
            0,
        ]
        return cli("train", *base, *flags, *words)

    return run
