"""Files that tools read: the hooks of pre-commit, the workflow of GitHub, the Makefile."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def recipe(target: str) -> list[str]:
    """The commands of a target, with the tools' folder as it is by default."""
    (body,) = re.findall(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, re.M)
    return [line.strip().replace("$(BIN)", ".venv/bin") for line in body.splitlines()]


def load(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def test_hooks_run_what_make_lint_runs() -> None:
    """A commit passes its hooks and fails in CI."""
    (repository,) = load(".pre-commit-config.yaml")["repos"]
    entries = [re.sub(r"^bash -c '(.+)'$", r"\1", hook["entry"]) for hook in repository["hooks"]]
    assert entries == recipe("lint")
    assert all(hook["language"] == "system" for hook in repository["hooks"])
    assert not any(hook["pass_filenames"] for hook in repository["hooks"])


def test_the_workflow_runs_ci_and_every_cell_of_the_matrix() -> None:
    """A Python that is declared is tested by nobody."""
    workflow = load(".github/workflows/ci.yml")
    assert set(workflow[True]) == {
        "push",
        "pull_request",
        "schedule",
        "workflow_dispatch",
    }  # YAML 1.1 reads `on`
    jobs = workflow["jobs"]
    commands = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in jobs.items()}
    assert commands["test"] == [".ci/run"]
    assert commands["docs"] == ["make docs"]
    assert commands["matrix"] == ["make test-matrix CELLS=${{ matrix.python }}-${{ matrix.packages }}"]
    nox = ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8"))
    values = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in nox.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        if node.targets[0].id in ("PYTHONS", "RESOLUTIONS")
    }
    cells = jobs["matrix"]["strategy"]["matrix"]
    assert tuple(cells["python"]) == values["PYTHONS"]
    assert cells["packages"] == list(values["RESOLUTIONS"])


def test_make_docs_installs_the_extra() -> None:
    """`pip install '.[docs]'` and `make docs` would build with other tools."""
    (listed,) = re.findall(r"^docs = \[(.+)\]$", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)
    wanted = re.findall(r'"(.+?)"', listed)
    (install,) = re.findall(r"^\t@.+pip install .+'zensical(?:.+\\\n)*.+$", MAKEFILE, re.M)
    assert re.findall(r"'(.+?)'", install) == wanted


def test_every_target_is_phony() -> None:
    """`make docs` would do nothing, as there is a folder of that name."""
    (phony,) = re.findall(r"^\.PHONY: (.+)$", MAKEFILE, re.M)
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.M))
    assert targets == set(phony.split())
