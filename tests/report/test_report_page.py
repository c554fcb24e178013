"""The page as a file: self-contained, readable without seeing it, and with the numbers of the files."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes

from clipgraft.errors import CheckpointError, ConfigError
from clipgraft.report import charts
from clipgraft.report.tables import ResultRow
from clipgraft.report.write_report import write_report
from html_pages import Element, Page, read_page
from tiny_pictures import IMAGES

_RETRIEVAL = ("image_to_text_R@1", "image_to_text_R@5", "text_to_image_R@1", "text_to_image_R@5")
_CLASSES = ("acc1", "acc5", "mean_per_class_recall")


def rows_of(page: Page, task: str) -> list[tuple[str, list[float]]]:
    """(label, the machine-readable numbers) of each body row of the results of a task."""
    regions = [e for e in page.all("div") if e.attributes.get("aria-label") == f"Results, {task}"]
    (region,) = regions
    rows = [
        e for e in page.all("tr") if region in e.parents and e.inside("tbody") and "class" in e.attributes
    ]
    found = []
    for row in rows:
        inside = [e for e in page.elements if row in e.parents]
        (head,) = [e for e in inside if e.tag == "th"]
        found.append((head.text.strip(), [float(e.attributes["value"]) for e in inside if e.tag == "data"]))
    return found


def test_nothing_is_fetched(page: Page) -> None:
    """A report that is opened on a train or in a clinic is broken, or tells somebody that it was opened."""
    for element in page.elements:
        assert element.tag not in ("script", "link", "iframe", "object", "base", "embed")
        for name, value in element.attributes.items():
            assert "//" not in value or value.startswith("data:image/jpeg;base64,"), (element.tag, name)
            if name in ("src", "href", "xlink:href", "action", "srcset"):
                assert value.startswith(("#", "data:image/jpeg;base64,")), (element.tag, value[:60])
    (style,) = page.all("style")
    assert not re.search(r"@import|url\(|//", style.text)
    (policy,) = [e for e in page.all("meta") if "content-security-policy" in str(e.attributes).lower()]
    assert policy.attributes["content"].startswith("default-src 'none'; img-src data:;")


def test_ids_are_unique_and_links_lead_somewhere(page: Page) -> None:
    """A chart takes the markers of another, or a link of the contents does nothing."""
    ids = Counter(e.attributes["id"] for e in page.elements if "id" in e.attributes)
    assert [name for name, times in ids.items() if times > 1] == []
    for element in page.elements:
        for name in ("href", "aria-labelledby"):
            for target in element.attributes.get(name, "").split():
                if name != "href" or target.startswith("#"):
                    assert target.removeprefix("#") in ids, target
    for target in re.findall(r"url\(#([^)]+)\)", page.html):
        assert target in ids


def test_it_can_be_read_without_seeing_it(page: Page) -> None:
    """Pictures, charts and tables are silent to a screen reader."""
    for picture in page.all("svg", role="img"):
        labelled = picture.attributes.get("aria-label") or picture.attributes.get("aria-labelledby")
        assert labelled, picture.attributes
    silent = [e for e in page.all("svg") if "role" not in e.attributes and "aria-hidden" not in e.attributes]
    assert silent == []
    assert all(e.attributes.get("alt") for e in page.all("img"))
    for chart in page.all("svg", class_="chart"):
        titles = [e.text for e in page.elements if chart in e.parents and e.tag in ("title", "desc")]
        assert len(titles) == 2
        assert all(titles)
    for table in page.all("table"):
        assert [e for e in page.all("caption") if table in e.parents and e.text.strip()]
        heads = [e for e in page.all("th") if table in e.parents]
        assert {e.attributes.get("scope") for e in heads} <= {"col", "row", "colgroup", "rowgroup"}
    levels = [int(e.tag[1]) for e in page.elements if re.fullmatch(r"h[1-6]", e.tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    for section in page.all("section"):
        assert section.attributes["aria-labelledby"]
    (html,) = page.all("html")
    assert html.attributes["lang"] == "en"


def test_it_can_be_used_without_a_mouse(page: Page) -> None:
    """Somebody with a keyboard cannot reach the sections, the theme, or what a table has to its right."""
    links = [e.attributes["href"] for e in page.all("a")]
    sections = [f"#{e.attributes['id']}" for e in page.all("section")]
    assert links == ["#content", *sections]
    themes = page.all("input", type="radio", name="theme")
    assert [e.attributes["id"] for e in themes] == ["theme-auto", "theme-light", "theme-dark"]
    assert all(e.inside("label") for e in themes)
    for region in page.all("div", class_="scroll"):
        assert region.attributes["tabindex"] == "0"
        assert region.attributes["aria-label"]


def test_colours_are_the_themes(page: Page) -> None:
    """A chart keeps a black axis on a black page, or a colour that is defined nowhere."""
    defined = set(re.findall(r"(--[a-z0-9-]+)\s*:", page.all("style")[0].text))
    assert set(re.findall(r"var\((--[a-z0-9-]+)\)", page.html)) <= defined
    for chart in page.all("svg", class_="chart"):
        inside = [e.attributes.get("style", "") for e in page.elements if chart in e.parents]
        assert not any(re.search(r"#[0-9a-f]{3,6}\b", style) for style in inside)


def test_how_each_was_trained_is_a_table(page: Page, world: Any) -> None:
    """Runs side by side whose learning rates, data and machines nobody can compare."""
    results = json.loads((world.run / "results.json").read_text())
    params = json.loads((world.run / "params.json").read_text())
    rows = [e.text for e in page.all("tr") if e.inside("table", **{"class": "how"})]
    told = next(text for text in rows if text.strip().startswith(f"{world.run.name}: "))
    for wanted in (f"{params['lr']:g}", f"{results['rows']:,}", results["made_with"]["machine"]):
        assert wanted in told
    assert f"torch {results['made_with']['torch']}" in told
    assert results["verdict"]["word"] in told


def test_curves_begin_with_the_base_and_mark_what_was_kept(page: Page, world: Any) -> None:
    """The start from which a curve rises, and the epoch that was saved, cannot be seen."""
    results = json.loads((world.run / "results.json").read_text())
    told = [e.text for e in page.all("desc") if "validation, % over epoch" in e.text]
    assert f"Kept: epoch {results['best_epoch']}." in told[0]
    assert "(kept)" in page.text
    assert "before the first step (epoch 0)" in page.text


@pytest.mark.parametrize("joined", [True, False])
def test_only_runs_of_one_sweep_are_joined(joined: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line between two unrelated runs claims what would lie between them."""
    drawn: list[Any] = []
    real = Axes.errorbar
    monkeypatch.setattr(Axes, "errorbar", lambda *a, **k: (drawn.append(k["linestyle"]), real(*a, **k))[1])
    lines = [
        ResultRow(
            "lora", f"run {rank}", "linear", rank, 1, {"acc1": rank / 10}, {}, 100 * rank, None, None, None
        )
        for rank in (1, 2)
    ]
    charts.against_weights("chart", "acc1", "accuracy", lines, joined)
    assert [style != "none" for style in drawn] == [joined]


def test_the_table_has_the_numbers_of_the_files(page: Page, world: Any) -> None:
    """The report says other numbers than the runs measured."""
    for task, run, sweep, metrics in (
        ("retrieval", world.run, world.sweep, _RETRIEVAL),
        ("classification", world.classes, world.class_sweep, _CLASSES),
    ):
        rows = rows_of(page, task)
        results = json.loads((run / "results.json").read_text())
        kept = next(line for line in results["history"] if line["epoch"] == results["best_epoch"])
        wanted = [[kept[m] for m in metrics]]
        wanted[0] += [results["trainable"], results["bytes"], results["seconds"]]
        assert rows[0][0] == "base"
        assert rows[1][0].startswith(f"{run.name}: ")
        assert rows[1][1] == pytest.approx(wanted[0])
        table = json.loads((sweep / "table.json").read_text())["rows"]
        assert len(rows) == 2 + len(table)
        for (label, numbers), row in zip(rows[2:], table, strict=True):
            assert label == {"base": "base", "full": "full fine-tuning", "lora": row["targets"]}[row["kind"]]
            expected = []
            for metric in metrics:
                expected += [row["mean"][metric]] + [row["deviation"][metric]] * (row["seeds"] > 1)
            expected += [row["trained"]]
            expected += [row["bytes"], row["seconds"]] if row["kind"] != "base" else []
            expected += [row["peak_mb"]] if row["peak_mb"] is not None else []
            assert numbers == pytest.approx(expected)


def test_every_section_is_there_in_its_order(page: Page) -> None:
    """What a reader looks for is not on the page, or comes before what explains it."""
    ids = [e.attributes["id"] for e in page.all("section")]
    order = [
        "ran",
        "table",
        "few-shot",
        "curves",
        "cost",
        "gallery",
        "errors",
        "classes",
        "similarity",
        "tested",
        "forgotten",
    ]
    assert ids == order
    terms = {e.text for e in page.all("dt") if e.inside("section", id="ran")}
    assert {"Model", "Training data", "Validation data", "Adapter", "Grid", "When", "Folder"} <= terms


def test_errors_add_up_with_the_results(page: Page, world: Any) -> None:
    """The groups of the error section leave captions out, or tell another recall than the table above."""
    (section,) = page.all("section", id="errors")
    rows = rows_of(page, "retrieval")
    regions = [e for e in page.all("div") if section in e.parents and "By length" in str(e.attributes)]
    assert len(regions) == 2  # of the run and of the sweep's best adapter
    region = regions[0]
    groups = [
        [float(e.attributes["value"]) for e in page.all("data") if row in e.parents]
        for row in page.all("tr")
        if region in row.parents and row.inside("tbody")
    ]
    assert sum(captions for captions, _, _ in groups) == 2 * IMAGES
    base = sum(captions * recall for captions, recall, _ in groups) / (2 * IMAGES)
    adapted = sum(captions * recall for captions, _, recall in groups) / (2 * IMAGES)
    text_to_image = _RETRIEVAL.index("text_to_image_R@1")
    assert base == pytest.approx(rows[0][1][text_to_image])
    (trained,) = [numbers for label, numbers in rows if label.startswith("run")]
    assert adapted == pytest.approx(trained[text_to_image])
    heads = [e.text for e in page.all("summary") if section in e.parents]
    assert any(re.fullmatch(r"Worst captions: \d+ of 24", head) for head in heads)


def test_pictures_are_kept_once(page: Page) -> None:
    """The page grows by every place where a picture is shown again, until no mail takes it."""
    symbols = page.all("symbol")
    uris = [e.attributes["href"] for e in page.all("image")]
    assert len(uris) == len(set(uris)) == len(symbols)
    used = [e.attributes["href"] for e in page.all("use") if e.attributes["href"].startswith("#picture-")]
    assert {name.removeprefix("#") for name in used} == {e.attributes["id"] for e in symbols}
    assert len(used) > len(symbols)
    assert page.path.stat().st_size < 3e6


def test_a_sweep_tells_what_it_does_on_its_test_data(page: Page, world: Any) -> None:
    """What every row of a sweep forgot is measured and not shown, or shown of another row."""
    rows = json.loads((world.class_sweep / "table.json").read_text())["rows"]
    (found,) = page.all("table", class_="tested")
    lines = [e for e in page.all("tr") if found in e.parents and e.inside("tbody")]
    shown = [[e.text for e in page.elements if e.tag in ("th", "td") and line in e.parents] for line in lines]
    assert [row[0] for row in shown] == ["base", "vision.1.*"]
    base, adapted = (row["mean"]["test_acc1"] for row in rows)
    assert shown[0][2] == f"{100 * base:.1f}"
    deviation = rows[1]["deviation"]["test_acc1"]
    change = f"{100 * (adapted - base):+.1f}".replace("-", "−").replace("+0.0", "0.0")
    assert shown[1][2] == f"{100 * adapted:.1f} ± {100 * deviation:.1f} ({change})"


def test_what_is_gained_and_kept_is_drawn(page: Page, world: Any) -> None:
    """A reader would not see what the adapter costs, or which strength is recommended."""
    curve = json.loads((world.run / "results.json").read_text())["strength"]
    assert f"{world.run.name}: gained and kept" in page.text
    saved = "and saved" if curve["recommended"] == 1 else "while 1, as trained, was saved"
    assert f"Strength {curve['recommended']:g} is recommended, {saved}: it keeps most" in page.text
    assert f"{curve['texts']:,} texts (built-in English texts about everyday things)" in page.text


def test_forgetting_is_told_with_its_change(page: Page, world: Any) -> None:
    """What an adapter cost elsewhere is shown with the wrong sign, or for the wrong data."""
    tables = page.all("table", class_="forgotten")
    assert len(tables) == 4
    record = json.loads((world.run / "results" / "forgotten.json").read_text())
    rows = [e for e in page.all("tr") if tables[0] in e.parents and e.inside("tbody")]
    for row, metric in zip(rows, _RETRIEVAL, strict=True):
        cells = [e.text for e in page.all("td") if row in e.parents]
        change = 100 * (record["adapted"][metric] - record["base"][metric])
        assert float(cells[2].replace("−", "-")) == pytest.approx(change, abs=0.051)


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", 'a & b\'s "run" $x^2$'])
def test_names_are_text(name: str, copied: Path, tmp_path: Path) -> None:
    """The name of a folder runs as code in the browser of whoever opens the report, or breaks the page."""
    moved = copied.rename(copied.with_name(name.replace("/", "∕")))
    page = read_page(write_report([moved], tmp_path / "report.html"))
    assert page.all("script") == []
    assert moved.name in page.all("h1")[0].text
    assert any(moved.name in e.text for e in page.all("title") if e.inside("svg"))


def test_without_examples(world: Any, tmp_path: Path) -> None:
    """`--no-examples` still needs the images, or leaves empty sections behind."""
    page = read_page(write_report([world.run, world.sweep], tmp_path / "report.html", examples=False))
    ids = [e.attributes["id"] for e in page.all("section")]
    assert ids == ["ran", "table", "curves", "cost", "forgotten"]
    assert page.all("symbol") == []
    assert "add --retained PATH" in page.text


def test_a_missing_package_is_named(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody without the extra gets a traceback instead of the command that installs it."""
    found = __import__("importlib.util").util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "jinja2" else found(name, *rest)
    )
    with pytest.raises(ConfigError, match=r"a report needs jinja2: pip install 'clipgraft\[report\]'"):
        write_report([world.run], tmp_path / "report.html")


def labels(elements: list[Element]) -> list[str]:
    return [e.attributes["aria-label"] for e in elements]


def test_the_true_image_is_framed_and_said(page: Page) -> None:
    """A gallery in which nobody can see, or hear, which image was asked for."""
    hits = page.all("li", class_="hit")
    thumbs = [e for e in page.all("svg", class_="thumb") if e.inside("li", **{"class": "hit"})]
    assert len(hits) == len(thumbs) > 0
    assert all("the true image" in text for text in labels(thumbs))
    others = [e for e in page.all("svg", class_="thumb") if e.inside("ol", **{"class": "strip"})]
    assert not any("the true image" in text for text in labels([e for e in others if e not in thumbs]))


def test_few_shots_are_shown_by_mode(page: Page, world: Any, tmp_path: Path) -> None:
    """The page has other numbers than the comparison wrote, or is refused where it is all there is."""
    rows = json.loads((world.few / "shots-2.json").read_text())["rows"]
    best = next(row for row in rows if row["mode"] == "prolip")
    (table,) = page.all("table", class_="few-shot")
    cells = [e.text for e in page.all("td") if table in e.parents]
    for metric in ("base", "novel", "harmonic mean"):
        assert f"{100 * best['mean'][metric]:.1f} ± {100 * best['deviation'][metric]:.1f}" in cells
    charts = [e for e in page.all("svg", class_="chart") if "by images a class" in e.text]
    assert len(charts) == 3

    alone = write_report([world.few], tmp_path / "alone.html").read_text()
    assert "Few shots" in alone
    assert "What was forgotten" not in alone
    record = world.few / "cells" / "zero-shot" / "cell.json"
    copied = shutil.copytree(world.few, tmp_path / "damaged") / record.relative_to(world.few)
    copied.write_text(record.read_text().replace('"novel"', '"R@1"'))
    with pytest.raises(CheckpointError, match="holds what no comparison wrote"):
        write_report([tmp_path / "damaged"], tmp_path / "never.html")
    assert not (tmp_path / "never.html").exists()
