"""Results in notebooks: HTML tables and data frames of the same rows, whatever a stranger's text holds."""

from __future__ import annotations

import sys
import types
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import clipgraft as cg
from clipgraft import notebook_tables
from clipgraft.data.examine import OddPair, OddPairs
from clipgraft.data.summary import PairReport
from clipgraft.errors import ConfigError
from clipgraft.evaluate.error_analysis import Answer, Asked, AskedCaptions
from clipgraft.notebook_tables import Tabled
from clipgraft.profile.training import TargetCost
from clipgraft.progress import showing
from clipgraft.results import Result, Results
from clipgraft.text_tables import Table

HOSTILE = '<script>alert(1)</script><img src=x onerror=alert(1)> & "quoted" \x1b[2J\nsecond'


class Reader(HTMLParser):
    """The cells and pictures of tables; anything that could run is an error."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.pictures: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ("table", "caption", "thead", "tbody", "tr", "th", "td", "img", "p"), tag
        assert {name for name, _ in attrs} <= {"style", "src", "alt"}
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")
        elif tag == "img":
            source = dict(attrs)["src"] or ""
            assert source.startswith("data:image/jpeg;base64,")
            self.pictures.append(source)

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A photo of noise, which does not compress."""
    noise = np.random.default_rng(0).integers(0, 255, (300, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def hits(*places: str | None) -> cg.search.Hits:
    """Search hits at places, in order."""
    return cg.search.Hits(
        cg.search.Hit(
            rank, 1 / (rank + 2), place, HOSTILE, {"path": place, "caption": HOSTILE, "width": rank}
        )
        for rank, place in enumerate(places, 1)
    )


def classified() -> Any:
    """Four images of three classes, one of which has no image and is never predicted."""
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 0.5], [3.0, 1.0, 2.0], [0.0, 4.0, 0.1]])
    labels = torch.tensor([0, 0, 0, 1])
    return cg.evaluate.classification_metrics(logits, labels, (HOSTILE, "b", "c"))


def results() -> dict[str, Tabled]:
    """One of every kind of result that needs no model."""
    features = torch.eye(5)[:, [1, 2, 0, 4, 3]] + 0.1 * torch.eye(5)
    found = cg.evaluate.retrieval_metrics(features, torch.eye(5), torch.arange(5))
    lines = [{**found, "epoch": 1.0}, {**found, "epoch": 2.0, "image_to_text_R@1": 0.123456}]
    report = {"source": Path(HOSTILE), "kind": "csv", "unit": "line", "rows": 5_000, "bad_rows": 3}
    answer = Answer(3, 0.1234, "missing.png", 0.5678)
    return {
        "metrics": found,
        "comparison": cg.evaluate.Comparison({HOSTILE: found, "other": found, "classes": {"acc1": 0.5}}),
        "odd": OddPairs([OddPair(Path(HOSTILE), HOSTILE.splitlines()[0][:80], 0.125)]),
        "classification": classified(),
        "classes": classified().metrics,
        "fit": cg.train.FitResult(
            Path(HOSTILE), Path(HOSTILE), 400_000, 28_672, 12.3, lines, dict(found), best_epoch=2
        ),
        "costs": Results(
            [TargetCost(HOSTILE, 4, 8, 12_345, 0.05, 0.125), TargetCost("b", 4, 9, 7, 0.1, 0.5)]
        ),
        "data": PairReport(**report, images=4, captions=9, fewest_captions=1, most_captions=2),  # type: ignore[arg-type]
        "hits": hits(None, None),
        "pairs": cg.Pairs((Path("x.png"), Path(HOSTILE)), ((HOSTILE, "b"), ("c",))),
        "labelled": cg.Labelled((Path("x.png"),), (0,), (HOSTILE,)),
        "errors": AskedCaptions("worst", 1, (Asked(HOSTILE, HOSTILE, {"base": answer}),)),
    }


@pytest.mark.parametrize("name", results())
def test_html_and_data_frame_have_the_rows_of_the_table(name: str) -> None:
    """A notebook shows other numbers than the print, or a caption of a stranger runs as a script."""
    result = results()[name]
    table, read = result.table(), Reader(result._repr_html_())
    before = len(result.pictures())
    assert [row[before:] for row in read.rows] == [list(table.columns), *map(list, shown_rows(table))]
    frame = result.to_pandas()
    assert list(frame.columns) == list(table.columns)
    values = frame.astype(object).where(frame.notna(), None).values.tolist()
    assert values == [list(row) for row in table.values]
    if "alert" in read.text:
        assert "<script>alert(1)</script>" in read.text
        assert "\x1b" not in read.text


def shown_rows(table: Table) -> list[list[str]]:
    """The cells with what is harmful written out."""
    return [[cell.replace("\x1b", "\\u001b").replace("\n", " | ") for cell in row] for row in table.rows]


def test_data_frames_hold_the_numbers_themselves() -> None:
    """A frame of rounded percents, or of text, cannot be computed with."""
    found = results()
    metrics = found["metrics"].to_pandas().set_index("")
    for direction in ("image_to_text", "text_to_image"):
        for name in ("R@1", "R@5", "mean_rank", "median_rank"):
            assert metrics.loc[direction, name] == found["metrics"][f"{direction}_{name}"]  # type: ignore[index]
    fit = found["fit"].to_pandas()
    assert fit["epoch"].tolist() == [0, 1, 2]
    assert fit["image_to_text_R@1"].tolist()[2] == 0.123456
    classes = found["classification"].to_pandas()
    assert classes["images"].tolist() == [3, 1, 0]
    assert classes["recall"].tolist()[:2] == [2 / 3, 1]
    assert classes["recall"].isna().tolist() == [False, False, True]
    assert found["costs"].to_pandas()["share"].tolist() == [0.125, 0.5]
    assert found["hits"].to_pandas()["score"].tolist() == [1 / 3, 1 / 4]
    assert found["pairs"].to_pandas()["title"].tolist() == [HOSTILE, "b", "c"]


def test_pictures_are_small_and_what_is_missing_is_named(picture: Path, tmp_path: Path) -> None:
    """One lost or damaged photo among hits is a traceback, or the notebook grows by megabytes."""
    (tmp_path / "b.png").write_bytes(b"no picture")
    read = Reader(hits(str(picture), str(tmp_path / "b.png"), str(tmp_path / "gone.png"))._repr_html_())
    (source,) = read.pictures
    assert len(source) < 40_000
    assert [row[0] for row in read.rows[1:]] == [
        "",
        "not an image that Pillow can read; convert it to JPEG or PNG",
        "not found",
    ]


@pytest.mark.parametrize(("limit", "value", "kept"), [("MOST_PICTURES", 2, 2), ("MOST_BYTES", 1, 1)])
def test_pictures_beyond_the_limit_are_counted(
    limit: str, value: int, kept: int, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A notebook with a thousand hits can no longer be opened, or hits seem to have no picture."""
    monkeypatch.setattr(notebook_tables, limit, value)
    read = Reader(hits(*[str(picture)] * 5)._repr_html_())
    assert len(read.pictures) == kept
    assert f"{5 - kept} pictures are left out" in read.text


def test_long_tables_say_how_much_is_left_out() -> None:
    """Half of a table seems to be all of it."""
    pairs = cg.Pairs((Path("x"),), (tuple(map(str, range(100))),))
    read = Reader(pairs._repr_html_())
    assert len(read.rows) == 1 + notebook_tables.MOST_ROWS
    assert "70 more rows are not shown" in read.text
    assert len(pairs.to_pandas()) == 100


def test_no_error_leaves_a_notebook_without_its_result() -> None:
    """A result of hours ends in a traceback because a table of it cannot be made."""

    class Broken(Tabled):
        def table(self) -> Table:
            raise KeyError("<b>")

    assert (
        Broken()._repr_html_() == "<p>Broken cannot be shown as a table: KeyError: &#x27;&lt;b&gt;&#x27;</p>"
    )


def test_slices_of_hits_are_hits() -> None:
    """`hits[:3]` was a bare list that a notebook prints as text."""
    found = hits("a", "b", "c")
    assert isinstance(found[:2], cg.search.Hits)
    assert found[:2] == list(found)[:2]
    assert found[0].path == "a"


def test_every_public_result_is_a_table() -> None:
    """One of the results that functions return is the only one without a table."""
    public = [
        getattr(space, name)
        for space in map(cg.__getattr__, ("data", "evaluate", "search", "train"))
        for name in space.__all__
    ]
    wanted = ("Result", "Report", "Hits", "Comparison", "Metrics", "Errors", "Pairs", "Labelled")
    kinds = [kind for kind in public if isinstance(kind, type) and kind.__name__.endswith(wanted)]
    assert len(kinds) >= 6
    assert [kind for kind in kinds if not issubclass(kind, Tabled)] == []
    assert issubclass(Result, Tabled)


def test_a_missing_pandas_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """`to_pandas` without pandas is a ModuleNotFoundError that does not say what to install."""
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ConfigError, match=r"^`to_pandas` needs pandas: pip install 'clipgraft\[notebook\]'$"):
        results()["metrics"].to_pandas()


def test_bars_without_ipywidgets_are_text(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A notebook without ipywidgets shows a warning, or no bar at all."""
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with showing(None, "images") as told:
            assert told is not None
            told(1, 4)
            told(4, 4)
    assert "images" in capfd.readouterr().err


NOTEBOOK = """
import warnings; warnings.simplefilter("error")
import sys
{first}
import clipgraft as cg
from clipgraft.progress import showing
with showing(None, "images") as told:
    told(1, 2)
cg.evaluate.retrieval_metrics(*[__import__("torch").eye(3)] * 2, __import__("torch").arange(3))
"""


@pytest.mark.slow
@pytest.mark.parametrize("widgets", [True, False])
def test_a_kernel_shows_tables_and_bars(widgets: bool) -> None:
    """In Jupyter itself results are bare text, or bars are missing or warn."""
    nbformat = pytest.importorskip("nbformat", reason="no kernel to run a notebook in")
    client = pytest.importorskip("nbclient", reason="no kernel to run a notebook in")
    pytest.importorskip("ipywidgets", reason="no kernel to run a notebook in")
    first = "" if widgets else "sys.modules['ipywidgets'] = None"
    cell = nbformat.v4.new_code_cell(NOTEBOOK.format(first=first))
    book = nbformat.v4.new_notebook(cells=[cell])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the client's own
        client.NotebookClient(book, timeout=120, kernel_name="python3").execute()
    outputs = book.cells[0].outputs
    (shown,) = [output for output in outputs if output.output_type == "execute_result"]
    assert set(shown.data) == {"text/html", "text/plain"}
    assert ["", "R@1", "R@5", "R@10", "mean_rank", "median_rank"] in Reader(shown.data["text/html"]).rows
    bars = [
        output for output in outputs if "application/vnd.jupyter.widget-view+json" in output.get("data", {})
    ]
    texts = [output.text for output in outputs if output.output_type == "stream"]
    assert len(bars) == widgets
    assert any("images" in text for text in texts) != widgets
