"""Messages of the library name Python's options; those of the command line name flags."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field

import clipgraft as cg
from clipgraft.cli.flags.groups import Group, build_options
from clipgraft.cli.main import main
from clipgraft.cli.parser import parse
from clipgraft.cli.terminal import Wording, reworded, wording
from clipgraft.options import Options, Positional
from clipgraft.train.args import RunArgs
from clipgraft.train.run_folder import RunFolder


class Adapter(Options):
    """An adapter."""

    r: int = Field(16, ge=1, le=99, description="rank")
    use_dora: bool = Field(False, description="DoRA")
    targets: str = Field("text", description="sites")


class Run(Options):
    """A run."""

    out: Annotated[str, Positional()] = Field("runs", description="folder")
    epochs: int = Field(1, description="passes")
    save_lora_only: bool = Field(True, description="adapters alone")
    from_: str | None = Field(None, description="start")


ADAPTER = Group(Adapter, prefix="lora_", names={"use_dora": "lora_dora"}, without=frozenset({"targets"}))
KINDS = [ADAPTER, Run]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("lower `epochs` now", "lower --epochs now"),
        ("`epochs=3` or more", "--epochs 3 or more"),
        ("`save_lora_only=False` keeps all", "--no-save-lora-only keeps all"),
        ("`save_lora_only=True`", "--save-lora-only"),
        ("`r` of `use_dora`", "--lora-r of --lora-dora"),
        ("`from_` and `from`", "--from and --from"),
        ("`from_='a b'`", "--from 'a b'"),
        ('`from_="ab"`', "--from ab"),
        ("`out` exists", "OUT exists"),
        ("`targets` is no field that the command offers", "`targets` is no field that the command offers"),
        ("`clipgraft encode` and `cg.fit`", "`clipgraft encode` and `cg.fit`"),
        ("epochs without marks", "epochs without marks"),
    ],
)
def test_options_become_flags(text: str, wanted: str) -> None:
    """A user of the command line would be told to set something that they cannot type."""
    words = Wording()
    words.learn(KINDS)
    assert words(text) == wanted


def test_nothing_is_rewritten_before_a_command_is_known() -> None:
    """A library message would be changed for a program that imports the package."""
    assert Wording()("`epochs`") == "`epochs`"


def test_log_lines_are_rewritten_and_what_strangers_wrote_is_not(caplog: pytest.LogCaptureFixture) -> None:
    """The log of a run would speak of options that its user never typed, or change a file's name."""
    log = logging.getLogger("clipgraft")
    with caplog.at_level(logging.INFO, "clipgraft"):
        with reworded(log):
            wording.learn(KINDS)
            log.info("raise `epochs` from %d at %s: %s", 3, Path("`epochs`"), "`r`")
        log.info("`epochs` again")
    assert caplog.messages == ["raise --epochs from 3 at `epochs`: --lora-r", "`epochs` again"]


def test_the_log_of_a_run_names_flags_where_a_command_made_it(tmp_path: Path) -> None:
    """out.log would say something else than the terminal did."""
    log = logging.getLogger("clipgraft")
    with reworded(log):
        wording.learn(KINDS)
        folder = RunFolder(RunArgs(out=tmp_path / "run"), {"source": {}})
        error = cg.errors.TrainingError("lower `r`")
        with folder:
            log.info("see `epochs`")
            folder.__exit__(type(error), error, None)
    told = (tmp_path / "run" / "out.log").read_text()
    assert "see --epochs" in told
    assert "TrainingError: lower --lora-r" in told


def test_errors_of_a_command_name_flags(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`clipgraft train` would end with a Python name on standard error."""

    def run(arguments: list[str]) -> int:
        parse("train", "", KINDS, arguments)
        raise cg.errors.ConfigError("lower `r`")

    monkeypatch.setattr(sys.modules["clipgraft.cli.main"], "_dispatch", run)
    assert main(["--epochs", "3"]) == 2
    assert capsys.readouterr().err == "clipgraft: lower --lora-r\n"
    assert wording("`r`") == "`r`"


def test_a_prefix_names_flags_and_faults() -> None:
    """One declaration serves Python's `r=` and the command line's `--lora-r`."""
    adapter, run = build_options(KINDS, {"lora_r": "4", "lora_dora": "yes", "epochs": 2})
    assert (adapter, run) == (Adapter(r=4, use_dora=True), Run(epochs=2))
    with pytest.raises(cg.errors.ConfigError) as caught:
        build_options(KINDS, {"lora_r": 0, "lora_targets": "x", "out": 1.5j})
    assert str(caught.value).splitlines() == [
        "--lora-targets: there is no such flag (did you mean --lora-r?)",
        "--lora-r: got 0, allowed is greater than or equal to 1",
        "OUT: got 1.5j, allowed is text",
    ]
