"""`clipgraft completion`: what the shells themselves offer after a press of TAB."""

from __future__ import annotations

import os
import pty
import select
import shlex
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from clipgraft.cli.completion import command, script
from clipgraft.cli.declared import declared
from clipgraft.cli.main import VERBS

# What is typed, and a word that is offered then; the folder holds photos.csv, `my data` and a folder `train`.
OFFERED = [
    ("clipgraft tra", "train"),
    ("clipgraft train --lora-in", "--lora-init"),
    ("clipgraft train --loss so", "softmax"),
    ("clipgraft train --train-data ph", "photos.csv"),
    ("clipgraft train --model em", "emoji"),
    ("clipgraft train --model ph", "photos.csv"),
    ("clipgraft serve --adapters a ph", "photos.csv"),
    ("clipgraft merge ph", "photos.csv"),
    ("clipgraft merge a b --to tran", "transformers"),
    ("clipgraft completion fi", "fish"),
    ("clipgraft config swe", "sweep"),
]


@pytest.fixture(scope="module")
def scripts() -> dict[str, str]:
    """The script for each shell, as it is printed."""
    commands = [command(verb, declared(verb)) for verb in VERBS]
    return {shell: script(shell, commands) for shell in ("bash", "zsh", "fish")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder to complete names in."""
    work = tmp_path / "work"
    (work / "my data").mkdir(parents=True)
    (work / "train").mkdir()
    (work / "photos.csv").touch()
    return work


def found(shell: str) -> str:
    path = shutil.which(shell)
    if path is None:
        pytest.skip("this shell is not installed")
    return path


def in_bash(script: str, line: str, folder: Path) -> list[str]:
    """What bash has in COMPREPLY after TAB at the end of a line, where it takes = for a word of its own."""
    words = [word for part in shlex.split(line) for word in part.replace("=", " = ").split(" ")]
    words += [""] if line.endswith(" ") else []
    asking = 'COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _clipgraft; printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(
        ["bash", "--norc", "-c", f"{script}\n{asking}", "bash", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        *((line, [word]) for line, word in OFFERED),
        ("clipgraft train --loss=s", ["softmax", "sigmoid"]),
        ("clipgraft train --epochs ", ["auto"]),
        ("clipgraft train --batch-size ", [""]),
        ("clipgraft train --use-lora --no-use", ["--no-use-lora"]),
        ("clipgraft merge my", ["my data"]),
        ("clipgraft encode photos out --adapters vi=ph", ["photos.csv"]),
        ("clipgraft --v", ["--version"]),
    ],
)
def test_bash_offers(line: str, wanted: list[str], scripts: dict[str, str], folder: Path) -> None:
    """TAB in the most common shell offers nothing, or something that the command refuses."""
    assert in_bash(scripts["bash"], line, folder) == wanted


def test_bash_offers_every_flag(scripts: dict[str, str], folder: Path) -> None:
    """A flag that nobody remembers is not offered, or one that does not exist is."""
    for verb in ("train", "serve", "doctor"):
        options = command(verb, declared(verb)).flags
        offered = in_bash(scripts["bash"], f"clipgraft {verb} --", folder)
        assert sorted(offered) == sorted(option.name for option in options)


def test_fish_offers(scripts: dict[str, str], folder: Path) -> None:
    """TAB in fish, which has the descriptions beside the words, offers nothing or too much."""
    asking = "".join(f"echo '>'; complete -C {shlex.quote(line)}\n" for line, _ in OFFERED)
    done = subprocess.run(
        [found("fish"), "--no-config"],
        input=f"{scripts['fish']}\n{asking}",
        cwd=folder,
        env={"HOME": str(folder.parent), "PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"},
        capture_output=True,
        text=True,
        check=True,
    )
    answers = [block.split("\n")[1:] for block in f"\n{done.stdout}".split("\n>")[1:]]
    words = [[line.split("\t")[0] for line in answer if line] for answer in answers]
    assert words == [[word] for _, word in OFFERED]
    assert "train a LoRA adapter" in answers[0][0]


def test_zsh_completes(scripts: dict[str, str], folder: Path) -> None:
    """TAB in zsh, macOS's shell, completes nothing or complains."""
    (folder.parent / "_clipgraft").write_text(scripts["zsh"], encoding="utf-8")
    terminal = Terminal([found("zsh"), "-f", "-i"], folder)
    terminal.type("PS1='> '; autoload -U compinit; compinit -u -D; source ../_clipgraft; echo rea''dy\n")
    terminal.until("ready\r\n")
    for line, word in OFFERED:
        # Complete, then go to the start of the line and print what stands there.
        terminal.type(f"{line}\t\x01echo '[\x05]'\n")
        shown = terminal.until("]\r\n")
        wanted = " ".join([*line.split()[:-1], word])
        assert f"\n[{wanted}]\r\n" in shown.replace("/]", "]"), shown
    terminal.close()


class Terminal:
    """A program at a terminal, which is typed to and read from."""

    def __init__(self, words: list[str], folder: Path) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            env = {"HOME": str(folder.parent), "TERM": "dumb", "PATH": os.environ["PATH"], "COLUMNS": "200"}
            os.execve(words[0], words, env)

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def until(self, mark: str, seconds: float = 60) -> str:
        """What is shown up to a mark; fails where it does not come."""
        got, end = b"", time.monotonic() + seconds
        while mark.encode() not in got:
            assert time.monotonic() < end, got.decode(errors="replace")
            if select.select([self.fd], [], [], 0.2)[0]:
                got += os.read(self.fd, 4096)
        return got.decode(errors="replace")

    def close(self) -> None:
        os.close(self.fd)
        os.waitpid(self.pid, 0)


def test_the_printed_script_is_the_tested_one(cli: Any, scripts: dict[str, str]) -> None:
    """The command prints something else than what the shells were tried with."""
    for shell, text in scripts.items():
        assert cli("completion", shell).out == f"{text}\n"
    outcome = cli("completion", "tcsh")
    assert (outcome.code, outcome.err) == (
        2,
        "clipgraft: SHELL: got 'tcsh', allowed is one of 'bash', 'zsh' or 'fish'\n",
    )
