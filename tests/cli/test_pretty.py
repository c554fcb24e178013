"""Output at a terminal has colours and tables of `rich`, and everywhere else none."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from clipgraft.text_tables import Table

TABLE = Table(
    "costs",
    ("site", "MACs", "a long name of a column"),
    (("text.q", "1.96 M", "[bold]x"), ("y\x1b[2J", "12 K", "")),
    "note",
)
SHOWING = (
    "import logging\nfrom clipgraft.cli.terminal import plain_output\nfrom clipgraft.cli.pretty import show\n"
    "from test_pretty import TABLE\n"
    "with plain_output():\n"
    "    show('before', TABLE)\n    logging.getLogger('clipgraft').warning('odd \\x1b[2J')\n"
)
ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


def at_terminal(code: str, **env: str) -> str:
    """What a script writes to a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    kept |= {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]), "COLUMNS": "80"}
    done = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**kept, "TERM": "xterm", **env},
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            more = os.read(ours, 4096)
        except OSError:  # how Linux says that the other side is closed
            break
        if not more:
            break
        written += more
    os.close(ours)
    assert done.wait() == 0, written.decode()
    return written.decode().replace("\r\n", "\n")


def test_a_terminal_gets_colours_and_a_rule_below_the_header() -> None:
    """Tables in a terminal are as grey as in a file; or a caption's own escape sequences get through."""
    written = at_terminal(SHOWING)
    assert "\x1b[1;36mcosts" in written
    assert re.search(r"\x1b\[33modd \\u001b\[2J", written)
    assert "\x1b[2J" not in written
    plain = ESCAPE.sub("", written).splitlines()
    assert plain[:3] == ["before", "", "costs"]
    assert set(plain.pop(4)) == {"─"}
    assert [line.rstrip() for line in plain[2:-1]] == TABLE.text(80).splitlines()


@pytest.mark.parametrize("env", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_colours_can_be_turned_off(env: dict[str, str]) -> None:
    """Somebody who asked for no colours gets them."""
    written = at_terminal(SHOWING, **env)
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", written)
    if "TERM" in env:
        assert "\x1b" not in written
        assert TABLE.text(80) in written


def test_a_pipe_gets_plain_text_without_rich() -> None:
    """A script that reads a table finds escape sequences or other lines in it, or waits for rich."""
    code = f"{SHOWING}import sys\nassert 'rich' not in sys.modules\n"
    env = {
        **os.environ,
        "FORCE_COLOR": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout == f"before\n\n{TABLE.text()}\nodd \\u001b[2J\n"


def test_errors_of_a_command_are_marked_in_a_terminal() -> None:
    """The one line that matters is lost among the others."""
    written = at_terminal("from clipgraft.cli.main import main\nmain(['trian'])")
    assert written.startswith("\x1b[1;31mclipgraft: \x1b[0mthere is no command 'trian' (did you mean train?)")
    assert written.count("\n") == 1
