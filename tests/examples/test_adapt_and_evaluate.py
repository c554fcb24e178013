"""The first example, as a program and as a notebook, run as a user runs them."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

import clipgraft as cg

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "examples" / "adapt_and_evaluate.py"
NOTEBOOK = PROGRAM.with_suffix(".ipynb")


def code_cells() -> list[dict[str, Any]]:
    """The cells that a person runs, in order."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def check(out: Path, rows: dict[str, dict[str, float]]) -> None:
    """What every run must leave, whatever its size."""
    assert list(rows) == ["base", "adapter", "full"]
    assert all(0 <= share <= 1 for row in rows.values() for share in row.values())
    assert len({row["vi"] for row in rows.values()}) > 1
    (adapter,) = out.glob("runs-*/lora/adapter")
    assert cg.read_adapter(adapter).settings.r == 16
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/") > 0
    assert "Retrieved images" in page


@pytest.mark.slow
def test_the_program_runs(program: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first program that a newcomer copies ends in a traceback, or its page is empty."""
    rows = program("adapt_and_evaluate").compare(tmp_path, train_scenes=40, test_scenes=16)
    check(tmp_path, rows)
    assert f"adapter             {rows['adapter']['vi']:>12.1%}" in capsys.readouterr().out


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A cell of the notebook needs what no cell before it makes."""
    names: dict[str, Any] = {}
    for cell in code_cells():
        exec(compile("".join(cell["source"]), NOTEBOOK.name, "exec"), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            names |= {"out": tmp_path, "train_scenes": 40, "test_scenes": 16}
    check(tmp_path, names["rows"])


def test_the_notebook_is_that_of_the_program() -> None:
    """Program and notebook tell different stories, or the notebook ships somebody's outputs."""
    made = runpy.run_path(str(ROOT / "scripts" / "notebook.py"))["notebook"]
    stored = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert stored == made(PROGRAM.read_text(encoding="utf-8")), "run python scripts/notebook.py"
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code_cells())
    told = "".join(line.strip() for cell in code_cells() for line in "".join(cell["source"]).splitlines())
    for line in (
        PROGRAM.read_text(encoding="utf-8").split("# %% ", 1)[1].split("\n    return", 1)[0].splitlines()
    ):
        if line.strip() and not line.strip().startswith("#") and line.startswith("    "):
            assert line.strip() in told


@pytest.mark.slow
def test_the_adapter_beats_the_base(program: Any, tmp_path: Path) -> None:
    """The example shows an adapter that is no better than the base, or far from full fine-tuning."""
    rows = program("adapt_and_evaluate").compare(tmp_path)
    assert rows["adapter"]["vi"] >= rows["base"]["vi"] + 0.1, rows
    assert rows["adapter"]["vi"] >= 0.9 * rows["full"]["vi"], rows
