"""The pages of the documentation: links, the reference of Python, the navigation, environment variables.

`make docs` checks links and names too, with a package that tests do without.
"""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import clipgraft as cg
from doc_pages import PAGES, ROOT

SOURCE = Path(cg.__file__).parent
REFERENCE = ROOT / "docs" / "reference"
DIRECTIVE = re.compile(r"^::: (\S+)$", re.MULTILINE)
FENCE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|mailto:)(?P<path>[^)#\s]*)(?:#(?P<anchor>[^)\s]+))?\)")
VARIABLE = re.compile(r"RANK|[A-Z]+_[A-Z0-9_]+")


def text_of(page: Path) -> str:
    """A page without its blocks of code."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text_of(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """A reader clicks and finds nothing."""
    broken = []
    for match in LINK.finditer(re.sub(r"`[^`\n]*`", "", text_of(page))):
        target = (page.parent / match["path"]).resolve() if match["path"] else page
        if not target.exists() or (match["anchor"] and match["anchor"] not in anchors(target)):
            broken.append(match[0])
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_exist(page: Path) -> None:
    """A page sends somebody who wants to change something to a file that has moved."""
    named = re.findall(r"`([\w/]+(?:\.py|/))`", text_of(page))
    ours = [name for name in named if name.endswith(".py") or (SOURCE / name.split("/")[0]).is_dir()]
    places = (ROOT, SOURCE, SOURCE.parent, page.parent)
    assert [name for name in ours if not any((place / name).exists() for place in places)] == []


def public() -> set[str]:
    """The paths of all that is public: functions and classes of the namespaces, and errors."""
    spaces = ["clipgraft", *(f"clipgraft.{stub.parent.name}" for stub in SOURCE.glob("*/__init__.pyi"))]
    modules = {space: importlib.import_module(space) for space in spaces}
    found = {f"{space}.{name}" for space, module in modules.items() for name in module.__all__}
    errors = vars(importlib.import_module("clipgraft.errors")).items()
    found |= {f"clipgraft.errors.{name}" for name, value in errors if getattr(value, "mro", None)}
    return {path for path in found if callable(resolve(path)) and "clipgraft" in resolve(path).__module__}


def resolve(path: str) -> Any:
    """What `::: PATH` stands for."""
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def test_the_reference_has_every_public_name() -> None:
    """A function that is meant for everybody is documented nowhere, or twice."""
    pages = [page.read_text(encoding="utf-8") for page in REFERENCE.glob("*.md")]
    paths = [path for page in pages for path in DIRECTIVE.findall(page)]
    assert sorted(set(paths)) == sorted(paths)
    written = {id(resolve(path)) for path in paths}
    assert [path for path in sorted(public()) if id(resolve(path)) not in written] == []


def test_the_navigation_has_every_page() -> None:
    """A page that no menu leads to is not read; an entry without its page stops `make docs`."""

    class Loader(yaml.SafeLoader):
        """Reads the one tag of mkdocs.yml, the name of a Python function, as text."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/name:", lambda loader, suffix, node: suffix)
    config = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)

    def files(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        entries = entry.values() if isinstance(entry, dict) else entry
        return [name for inner in entries for name in files(inner)]

    assert sorted(files(config["nav"])) == sorted(page.relative_to(ROOT).as_posix() for page in PAGES)


def variables_of(path: Path) -> set[str]:
    """The environment variables of a file: words in capitals, in files that look at the environment."""
    text = path.read_text(encoding="utf-8")
    found = set(re.findall(r"\bconstants\.(HF_\w+)", text))
    if "environ" in text:
        constants = {node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)}
        found |= {word for word in constants if isinstance(word, str) and VARIABLE.fullmatch(word)}
    return found


def test_every_environment_variable_is_described() -> None:
    """A variable changes what happens, and no page says so; or a page promises what nothing reads."""
    page = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    sections = re.split(r"^## .+$", page, flags=re.M)[1:]
    cells = ("".join(re.findall(r"^\| (`.+?`) \|", section, re.M)) for section in sections)
    ours, libraries, development = (set(re.findall(r"`(\w+)`", names)) for names in cells)
    read = {name for path in SOURCE.rglob("*.py") for name in variables_of(path)}
    assert {name for name in read if not name.startswith("HF_")} == ours
    assert {name for name in read if name.startswith("HF_")} <= libraries
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    used = {name for pair in re.findall(r"^(\w+) \?=|\$\$\{(\w+):-", makefile, re.M) for name in pair if name}
    for path in (*(ROOT / "fuzz").glob("*.py"), ROOT / "noxfile.py"):
        used |= variables_of(path)
    assert used - ours - libraries == development
