"""The door of the command line: verbs, help, exit codes, and errors in one line."""

from __future__ import annotations

import errno
import gc
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

import clipgraft as cg
from clipgraft.cli import eval as eval_command
from clipgraft.cli.main import VERBS, main
from clipgraft.errors import together


def test_help_lists_every_command(cli: Any) -> None:
    """A newcomer types `clipgraft --help` first."""
    outcome = cli("--help")
    assert outcome.code == 0
    assert all(f"\n  {verb}" in outcome.out for verb in VERBS)


def test_no_arguments_is_bad_usage(cli: Any) -> None:
    """A script with an empty variable must not look like a success."""
    assert cli().code == 2


def test_version(cli: Any) -> None:
    """Bug reports start with it."""
    assert cli("--version").out == f"clipgraft {cg.__version__}\n"


def test_unknown_commands_name_the_nearest(cli: Any) -> None:
    """A typo should cost one look, not a page of help."""
    outcome = cli("trian")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith(
        "clipgraft: there is no command 'trian' (did you mean train?); commands are data, train"
    )
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize("verb", VERBS)
def test_every_command_has_help(verb: str, cli: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """`clipgraft VERB --help` is where flags are looked up."""
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    assert f"usage: clipgraft {verb} [--flags]" in capsys.readouterr().out


def test_help_imports_nothing_large() -> None:
    """Help that loads torch takes seconds to appear."""
    large = {"torch", "torchvision", "numpy", "open_clip", "transformers", "PIL", "tensorboard", "tqdm"}
    slow = large | {"pydantic", "yaml", "argparse", "asyncio"}
    code = (
        "import sys\nfrom clipgraft.cli.main import VERBS, main\n"
        "def check(words, large):\n"
        "    try: main(words)\n"
        "    except SystemExit: pass\n"
        "    if large & set(sys.modules): sys.exit(repr((words, large & set(sys.modules))))\n"
        f"check(['--help'], {slow!r})\n"
        f"for verb in VERBS: check([verb, '--help'], {large!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def raising(error: BaseException) -> Callable[..., None]:
    def run(argv: object) -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (cg.errors.DataError("the table is empty; add rows"), 2, "clipgraft: the table is empty; add rows\n"),
        (together(["one", "two"]), 2, "clipgraft: one\nclipgraft: two\n"),
        (cg.errors.DataError("a\nb.jpg: lost"), 2, "clipgraft: a\\nb.jpg: lost\n"),
        (cg.errors.TrainingError("the loss is nan"), 1, "clipgraft: the loss is nan\n"),
        (KeyboardInterrupt(), 130, "clipgraft: interrupted\n"),
        (KeyboardInterrupt("saved; go on"), 130, "clipgraft: saved; go on\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/out.json"),
            1,
            "clipgraft: /out.json: No space left on device\n",
        ),
        (ConnectionError("the hub\nis away"), 1, "clipgraft: the hub is away\n"),
    ],
)
def test_errors_are_lines_and_codes(
    error: BaseException, code: int, told: str, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scripts look at the code (2 bad input, 1 failure), people at the line; nobody at a traceback."""
    monkeypatch.setattr(eval_command, "run_eval", raising(error))
    outcome = cli("eval")
    assert (outcome.code, outcome.err) == (code, told)


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug that is hidden behind one line cannot be reported."""
    monkeypatch.setattr(eval_command, "run_eval", raising(ZeroDivisionError("bug")))
    with pytest.raises(ZeroDivisionError):
        main(["eval"])


def test_logging_is_left_as_it_was(cli: Any) -> None:
    """Calling `main` from Python would change the caller's own logging."""
    log = logging.getLogger("clipgraft")
    before = (log.level, log.propagate, list(log.handlers))
    cli("--version")
    assert (log.level, log.propagate, list(log.handlers)) == before


def test_a_closed_pipe_is_quiet() -> None:
    """`clipgraft train --help | head -1` would end in a complaint."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "clipgraft", "--help"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_utf8_whatever_the_locale() -> None:
    """A Vietnamese path in a message would crash under LANG=C or in a Windows console."""
    done = subprocess.run(
        [sys.executable, "-m", "clipgraft", "ảnh"],
        capture_output=True,
        env={**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
        check=False,
    )
    assert done.returncode == 2
    assert "clipgraft: there is no command 'ảnh'" in done.stderr.decode()


def test_collections_are_rare_in_a_command_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command would take a fifth longer to start; or a program that calls one would keep its settings."""
    before = gc.get_threshold()
    seen = []
    module = sys.modules["clipgraft.cli.main"]
    monkeypatch.setattr(module, "function_of", lambda _: lambda _: seen.append(gc.get_threshold()))
    assert main(["search"]) == 0
    assert gc.get_threshold() == before
    assert seen == [(10_000, *before[1:])]
