"""docs/models.md tells the truth about every model that the installed open_clip lists."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import open_clip
import pytest
import transformers

SCRIPT = Path(__file__).parents[2] / "scripts" / "models_table.py"
# What another processor rounds otherwise: errors, and whether there are any.
ERROR = re.compile(r"\b(\d+e-\d+|exact)(?=[ ;])")


@pytest.fixture(scope="module")
def table() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("models_table", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")  # the script sets it, and it is to end with this test
        patch.setitem(sys.modules, spec.name, module)  # where dataclasses look their annotations up
        spec.loader.exec_module(module)
        yield module


def same_libraries(page: str) -> bool:
    """Whether the page was written with the libraries that are installed, which list other models each."""
    return f"open_clip {open_clip.__version__}, transformers {transformers.__version__})" in page


def without_errors(text: str) -> str:
    return ERROR.sub("…", text)


def test_measured_errors_are_those_of_fp32(table: ModuleType) -> None:
    """The page shows an adapter that changes on its way, or a model whose way was never measured."""
    page = table.PAGE.read_text(encoding="utf-8")
    errors = [float(found) for found in re.findall(r"\d+e-\d+", page)]
    assert len(errors) > 150
    assert max(errors) <= 1e-5
    assert "not measured" not in page
    assert "not undone" not in page


def test_every_listed_model_has_a_row(table: ModuleType) -> None:
    """A model that can be loaded is not in the table of models."""
    page = table.PAGE.read_text(encoding="utf-8")
    if same_libraries(page):
        # `open_clip.list_models()` has those that other tests have added, too.
        configs = (Path(open_clip.__file__).parent / "model_configs").glob("*.json")
        assert all(f"\n| {config.stem} |" in page for config in configs)


@pytest.mark.parametrize("name", ["ViT-B-32", "EVA02-B-16", "RN50", "ViT-B-16-SigLIP"])
def test_rows_are_current(table: ModuleType, name: str) -> None:
    """The table promises sites that a model has not, or shortcuts that do not hold."""
    page = without_errors(table.PAGE.read_text(encoding="utf-8"))
    assert f"\n{without_errors(table.openclip_row(name).line())}\n" in page


@pytest.mark.slow
def test_the_page_is_current(table: ModuleType) -> None:
    """The table of models is of an older clipgraft: run scripts/models_table.py again."""
    page = table.PAGE.read_text(encoding="utf-8")
    if same_libraries(page):
        assert without_errors(table.page()) == without_errors(page)
