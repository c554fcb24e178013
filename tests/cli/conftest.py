"""The command line in this process, on a tiny base and a dozen pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from clipgraft.cli import main
from clipgraft.models.clip import Clip
from clipgraft.profile.forward import ClipProfile, costs
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


@pytest.fixture(autouse=True)
def _few_general_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoding the 2,000 texts that a model is held to takes longer than all else in training a tiny one."""
    monkeypatch.setattr("clipgraft.data.general_texts.GENERAL", 100)


@pytest.fixture(autouse=True)
def _costs_once(_known_costs: dict[str, ClipProfile], monkeypatch: pytest.MonkeyPatch) -> None:
    """Count once what models of one structure cost: `write_results` has tests of its own."""

    def known(clip: Clip) -> ClipProfile:
        weights = [(name, p.shape, p.dtype, p.requires_grad) for name, p in clip.model.named_parameters()]
        key = f"{clip.model} {weights} {clip.source.name}"
        if key not in _known_costs:
            _known_costs[key] = costs(clip)
        return _known_costs[key]

    monkeypatch.setattr("clipgraft.report.results.costs", known)


@pytest.fixture(scope="session")
def _known_costs() -> dict[str, ClipProfile]:
    return {}


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
