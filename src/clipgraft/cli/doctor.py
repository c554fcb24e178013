"""`clipgraft doctor`: what a report of a fault has to say about the machine, as text or JSON.

Whatever cannot be found out is a line that says why. Names of users, home folders, addresses' passwords and
values of secrets do not appear.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from clipgraft.cli.diagnosis import SECTIONS
from clipgraft.cli.findings import Finding
from clipgraft.cli.pretty import BAD, NOTE, say, show
from clipgraft.text_tables import Table

_SUMMARY = """Show versions, devices, speed, decoders and folders of this machine, for a report of a fault.

The exit code is 1 if something is broken that clipgraft cannot do without. Nothing is sent anywhere; one
request asks whether the hub answers."""


def run_doctor(argv: Sequence[str]) -> None:
    """Parse, look, print; ends with exit code 1 where something necessary is broken."""
    as_json = _wants_json(argv)
    found = {
        title: [finding.rewritten(private) for finding in look_at()] for title, look_at in SECTIONS.items()
    }
    _print_json(found) if as_json else _print_text(found)
    broken = [finding for findings in found.values() for finding in findings if finding.state == "broken"]
    if broken:
        sys.stdout.flush()
        for finding in broken:
            say(f"{finding.name}: {finding.text}", sys.stderr, BAD, mark="broken: ")
        raise SystemExit(1)


def _wants_json(argv: Sequence[str]) -> bool:
    """Parse; where the packages that parsing needs are broken, look for the one flag by hand."""
    try:
        from clipgraft.cli.flags.shell import DOCTOR
        from clipgraft.cli.parser import parse
    except ImportError:
        return "--json" in argv
    (spec,) = parse("doctor", _SUMMARY, [DOCTOR], argv)
    return bool(spec.as_json)


def _print_json(found: dict[str, list[Finding]]) -> None:
    document = {
        title: {
            finding.name: {"state": finding.state, "text": finding.text, **finding.numbers}
            for finding in findings
        }
        for title, findings in found.items()
    }
    print(json.dumps(document, indent=2, ensure_ascii=False))


def _print_text(found: dict[str, list[Finding]]) -> None:
    wide = max(len(finding.name) for findings in found.values() for finding in findings)
    for number, (title, findings) in enumerate(found.items()):
        if number:
            print()
        show(Table(title, (), ()))
        for finding in findings:
            line = f"  {finding.name:<{wide}}  {finding.text}"
            styles = {"broken": BAD, "missing": NOTE}
            if finding.state in styles:
                say(line, sys.stdout, styles[finding.state])
            else:
                print(line)


_PASSWORD = re.compile(r"(?<=//)[^/@\s]+@")


def private(text: str) -> str:
    """The text without home folder, the user's name in paths, and passwords in addresses."""
    for home in _homes():
        text = re.sub(rf"{re.escape(home)}(?=[/\\]|$|[\s,;:)'\"])", "~", text)
    if len(user := _user()) > 1:
        text = re.sub(rf"(?<=[/\\]){re.escape(user)}(?=[/\\]|$|[\s,;:)'\"])", "USER", text)
    return _PASSWORD.sub("***@", text)


def _homes() -> list[str]:
    """The home folder as it is named and as it is, the longer first; never `/`."""
    named = os.path.expanduser("~")  # noqa: PTH111 - raises nothing for an account without one
    found = {named, str(Path(named).resolve())} if Path(named).is_absolute() else set()
    return sorted((home for home in found if len(home) > 1), key=len, reverse=True)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # an account without a name, as in some containers
        return ""
