"""What a release is made of says the same everywhere: version, requirements, changelog, citation, recipe."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

import clipgraft as cg

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
KINDS = [kind["directory"] for kind in PROJECT["tool"]["towncrier"]["type"]]
# Packages that conda-forge has under another name.
ON_CONDA = {
    "torch": "pytorch",
    "open_clip_torch": "open-clip-torch",
    "matplotlib": "matplotlib-base",
    "prometheus-client": "prometheus_client",
}
# Extras that the recipe names, as far as conda-forge has them for every system.
CONSTRAINED = ("heic", "onnx", "parquet", "report", "search", "serve")
NOT_ON_CONDA = {"uvloop", "httptools", "h11", "anyio"}  # uvicorn-standard brings them


def recipe() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "recipe" / "recipe.yaml").read_text(encoding="utf-8"))
    return loaded


def for_conda(lines: list[str]) -> set[str]:
    """Requirements of pip as those of conda."""
    found = map(Requirement, lines)
    return {
        f"{ON_CONDA.get(each.name, each.name)} {each.specifier}"
        for each in found
        if each.name not in NOT_ON_CONDA
    }


def test_the_version_stands_in_one_place() -> None:
    """A release is called 0.2.0 in one file and 0.1.0 in another."""
    assert "version" in PROJECT["project"]["dynamic"]
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "src/clipgraft/__init__.py"
    assert recipe()["context"]["version"] == cg.__version__
    assert citation()["version"] == cg.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\S+)", changelog, re.M)[0] == cg.__version__


def test_the_recipe_needs_what_the_wheel_needs() -> None:
    """conda installs a clipgraft that does not start, or that stops at an old package."""
    project, found = PROJECT["project"], recipe()
    run = set(found["requirements"]["run"])
    assert run == for_conda(project["dependencies"]) | {"python >=${{ python_min }}"}
    assert project["requires-python"] == f">={found['context']['python_min']}"
    extras = [line for extra in CONSTRAINED for line in project["optional-dependencies"][extra]]
    assert set(found["requirements"]["run_constraints"]) == for_conda(extras)
    host = set(found["requirements"]["host"]) - {"pip", "python ${{ python_min }}.*"}
    assert host == for_conda(PROJECT["build-system"]["requires"])
    (entry,) = found["build"]["python"]["entry_points"]
    assert entry == "clipgraft = " + project["scripts"]["clipgraft"]
    assert found["about"]["license"] == project["license"]
    assert found["about"]["license_file"] == project["license-files"]


def citation() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    return loaded


def test_the_citation_is_one() -> None:
    """GitHub shows no `Cite this repository`, or a reference manager refuses it."""
    found = citation()
    # What the schema of CFF 1.2.0 requires, of the file and of each reference, and the keys it knows here.
    assert found["cff-version"] == "1.2.0"
    assert {"cff-version", "message", "title", "authors"} <= set(found)
    known = {"cff-version", "message", "title", "authors", "type", "abstract", "version", "license"}
    assert set(found) <= known | {"keywords", "references"}
    assert found["type"] in ("software", "dataset")
    assert found["license"] == PROJECT["project"]["license"]
    assert isinstance(found["version"], str)
    for each in (found, *found["references"]):
        assert each["authors"]
        assert all("name" in author or "family-names" in author for author in each["authors"])
    for reference in found["references"]:
        assert {"type", "title", "authors"} <= set(reference)
        assert isinstance(reference["year"], int)


def test_every_line_for_the_changelog_is_of_a_kind() -> None:
    """A change that was written down never shows up in the changelog."""
    files = {path.name for path in (ROOT / "changelog.d").iterdir()} - {"README.md", "template.md.jinja"}
    named = re.compile(rf"[a-z0-9+-]+\.({'|'.join(KINDS)})\.md")
    assert [name for name in files if not named.fullmatch(name)] == []
    for name in files:
        text = (ROOT / "changelog.d" / name).read_text(encoding="utf-8")
        assert text.strip(), name
        assert not text.startswith(("-", "#")), name


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """What towncrier reads, with a line of every kind."""
    for name in ("pyproject.toml", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "changelog.d", tmp_path / "changelog.d")
    (tmp_path / "src" / "clipgraft").mkdir(parents=True)
    for kind in KINDS:
        path = tmp_path / "changelog.d" / f"a-test.{kind}.md"
        path.write_text(f"A line of the kind {kind}: `cg.load`.\n", encoding="utf-8")
    return tmp_path


def test_a_release_moves_the_lines_into_the_changelog(copy: Path) -> None:
    """The lines of a release are lost, or the text of earlier ones is."""
    before = (copy / "CHANGELOG.md").read_text(encoding="utf-8")
    texts = {path: path.read_text(encoding="utf-8").strip() for path in (copy / "changelog.d").glob("*.*.md")}
    command = [sys.executable, "-m", "towncrier", "build", "--version", "7.0.0", "--date", "2030-01-02"]
    drafted = subprocess.run(
        [*command, "--draft"], cwd=copy, capture_output=True, text=True, check=True
    ).stdout
    assert (copy / "CHANGELOG.md").read_text(encoding="utf-8") == before
    subprocess.run([*command, "--keep"], cwd=copy, capture_output=True, check=True)
    after = (copy / "CHANGELOG.md").read_text(encoding="utf-8")
    head, _, earlier = before.partition("\n## 0.1.0")
    assert after.startswith(f"{head}\n## 7.0.0 (2030-01-02)\n\n### Added\n\n- ")
    assert after.endswith(f"\n## 0.1.0{earlier}")
    added = after.removeprefix(head).removesuffix(f"## 0.1.0{earlier}")
    assert re.findall(r"^### (\w+)$", added, re.M) == ["Added", "Changed", "Removed", "Fixed", "Security"]
    for text in texts.values():
        assert f"\n- {text}\n" in added
        assert text in drafted
    assert "\n\n\n" not in added.strip("\n")
