"""Run the tests on every declared Python with the oldest and the newest packages: `make test-matrix`.

A cell is `3.10-lowest` or `3.13-newest`: a Python, and uv's resolution (`lowest-direct` takes the lower
bounds of pyproject.toml). Each is built, tested and deleted before the next. What it found goes to
benchmarks/results/matrix.json, beside what other cells found before, and all of it is printed as one table.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import nox

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
RESOLUTIONS = {"lowest": "lowest-direct", "newest": "highest"}
SHOWN = (
    *(
        "torch",
        "transformers",
        "open-clip-torch",
        "peft",
        "numpy",
        "pydantic",
        "pyarrow",
        "faiss-cpu",
        "onnx",
    ),
    "ray",
)
RESULTS = Path(__file__).parent / "benchmarks" / "results"
# An environment with CUDA's libraries, and what uv keeps of its downloads.
NEEDED_GB = 16

nox.options.default_venv_backend = "uv"
nox.options.stop_on_first_error = False


@nox.session(python=PYTHONS, venv_backend="uv")
@nox.parametrize("resolution", [nox.param(name, id=name) for name in RESOLUTIONS])
def matrix(session: nox.Session, resolution: str) -> None:
    """Run the tests in one cell."""
    home = Path(session.virtualenv.location).absolute()
    if shutil.disk_usage(home).free < NEEDED_GB * 1e9:
        session.run("uv", "cache", "clean", external=True)
    started = time.monotonic()
    cell: dict[str, Any] = {"python": str(session.python), "resolution": resolution}
    cell["date"] = time.strftime("%Y-%m-%d")
    report = home / "suite.xml"
    try:
        session.install("--resolution", RESOLUTIONS[resolution], "--editable", ".[test]")
        listed = session.run(
            *("uv", "pip", "list", "--format", "json"), external=True, silent=True, stderr=subprocess.DEVNULL
        )
        versions = {package["name"].lower(): package["version"] for package in json.loads(str(listed))}
        cell["versions"] = {name: versions.get(name, "-") for name in SHOWN}
        session.run(
            *("pytest", "-q", "-m", "not slow", "-n", os.environ.get("JOBS", "2"), f"--junit-xml={report}"),
            *("-p", "no:cacheprovider", *session.posargs),
            env={"OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
            success_codes=[0, 1],
        )
        cell |= outcome(report)
    finally:
        cell["minutes"] = round((time.monotonic() - started) / 60, 1)
        write(cell)
        session.log("\n" + table())
        shutil.rmtree(home, ignore_errors=True)
    if cell.get("failed", 1):
        session.error(f"{cell['python']}-{resolution}: {cell.get('failed', 'no')} tests failed")


@nox.session(python=False)
def matrix_table(session: nox.Session) -> None:
    """Print the results of all cells."""
    print(table())


def outcome(report: Path) -> dict[str, Any]:
    """Read pytest's report: how many passed, failed and were skipped, and the names of failed tests."""
    passed, failed, skipped = 0, [], 0
    for case in ET.parse(report).getroot().iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    return {"passed": passed, "failed": len(failed), "skipped": skipped, "failures": failed[:20]}


def found() -> list[dict[str, Any]]:
    """Read the results of all cells, in order."""
    path = RESULTS / "matrix.json"
    cells: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return sorted(cells, key=lambda cell: (PYTHONS.index(cell["python"]), cell["resolution"]))


def write(cell: dict[str, Any]) -> None:
    """Replace the previous result of a cell, and write numbers and page."""
    others = [c for c in found() if (c["python"], c["resolution"]) != (cell["python"], cell["resolution"])]
    (RESULTS / "matrix.json").write_text(json.dumps([*others, cell], indent=1) + "\n", encoding="utf-8")
    lines = [
        "# The range that is declared is the range that is tested",
        "",
        "Written by `make test-matrix` (noxfile.py): each Python with the lower bounds of pyproject.toml",
        "(`lowest`) and with the newest releases of that day, the suite without the tests marked slow.",
        "",
        table(),
        "",
    ]
    for c in found():
        lines += [f"- {c['python']}-{c['resolution']} failed: `{name}`" for name in c.get("failures", ())]
    (RESULTS / "matrix.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def table() -> str:
    """Format one line for each cell that ran; a failed installation has no counts."""
    counts = ("passed", "failed", "skipped", "minutes")
    head = ("python", "packages", *SHOWN, *counts, "date")
    rows = [
        (
            *(c["python"], c["resolution"], *(c.get("versions", {}).get(name, "-") for name in SHOWN)),
            *(str(c.get(name, "-")) for name in counts),
            c["date"],
        )
        for c in found()
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows))
