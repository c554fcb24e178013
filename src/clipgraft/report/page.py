"""Render the page from the template, with thumbnails as data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from tarfile import TarError
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image, ImageOps, UnidentifiedImageError

import clipgraft
from clipgraft.errors import DataError
from clipgraft.evaluate.error_analysis import Asked, RetrievalErrors
from clipgraft.evaluate.metrics import HEADLINE, TaskName
from clipgraft.pictures import open_image
from clipgraft.report import figures, tables
from clipgraft.report.examples import MODELS, Examples, Found, Retention
from clipgraft.report.few_shot import FewShot
from clipgraft.report.runs import Run, Sweep
from clipgraft.report.tables import ResultGroup, make_groups, on_test_data, progress_of
from clipgraft.stored_images import open_bytes
from clipgraft.text_tables import NOTHING

_COLUMNS: Mapping[TaskName, tuple[Any, ...]] = {
    "retrieval": (("image → text", (("R@1", 0), ("R@5", 1))), ("text → image", (("R@1", 2), ("R@5", 3)))),
    "classification": (("accuracy", (("first", 0), ("first 5", 1))), ("recall", (("mean", 2),))),
    "translation": (
        ("source → target", (("R@1", 0),)),
        ("target → source", (("R@1", 1),)),
        ("teacher", (("cosine", 2),)),
    ),
}


@dataclass(frozen=True)
class Section:
    """One run or sweep with its examples.

    Attributes:
        run: whose examples they are: the run itself, or that of a sweep's best adapter.
        examples: None where there are none.
        forgotten: None where that was not measured.
        notes: why something is missing, a sentence each.
    """

    source: Run | Sweep
    run: Run | None
    examples: Examples | None
    forgotten: Retention | None
    notes: tuple[str, ...]


def render(
    sections: Sequence[Section],
    few: Sequence[FewShot] = (),
    *,
    with_examples: bool,
    retained: str,
    now: datetime,
) -> str:
    """Render the page as HTML text; `retained` names the data on which forgetting was measured."""
    pictures = Thumbnails()
    known = {str(item.source.path): item.examples for item in sections if item.examples is not None}
    groups = make_groups([item.source for item in sections], known)
    parts = [_part(item, f"s{place}", pictures) for place, item in enumerate(sections)]
    template = _environment().get_template("page.html.j2")
    return template.render(
        title=_title([*(item.source.name for item in sections), *(item.name for item in few)]),
        now=now,
        version=clipgraft.__version__,
        style=Markup(_read("page.css")),
        in_short=[
            *(said for group in groups if (said := tables.in_short(group))),
            *((item.name, item.in_short) for item in few if item.in_short),
        ],
        parts=parts,
        few_shots=[_few_shot(item, f"f{place}") for place, item in enumerate(few)],
        tables=_tables(groups),
        costs=[(g, made) for n, g in enumerate(groups) if (made := _marked(figures.costs(g, f"g{n}")))],
        notes=[note for item in sections for note in item.notes],
        with_examples=with_examples,
        retained=retained,
        # Reading `pictures` comes last: the parts above have asked for all that are shown.
        pictures=pictures.all(),
        lost=len(pictures.missing),
    )


def _environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(_read),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": tables.percent,
        "change": tables.change,
        "whole": tables.whole,
        "megabytes": tables.megabytes,
        "duration": tables.duration,
    }
    environment.globals |= {
        "metric_words": tables.METRIC_WORDS,
        "metric_names": HEADLINE,
        "models": MODELS,
        "nothing": NOTHING,
    }
    return environment


def _read(name: str) -> str:
    return (files("clipgraft.report") / name).read_text(encoding="utf-8")


def _title(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _tables(groups: Sequence[ResultGroup]) -> list[dict[str, Any]]:
    """Make one table per task, since their columns differ."""
    made = []
    for task, heads in _COLUMNS.items():
        own = [group for group in groups if group.task == task]
        if own:
            ranked = any(line.r for group in own for line in group.lines)
            names = HEADLINE[task]
            how = list(dict.fromkeys(name for group in own for line in group.lines for name in line.how))
            made.append(
                {"task": task, "groups": own, "heads": heads, "metrics": names, "ranked": ranked, "how": how}
            )
    return made


def _few_shot(item: FewShot, name: str) -> dict[str, Any]:
    """Collect what the template shows of a few-shot comparison."""
    return {
        "name": item.name,
        "path": str(item.path),
        "setting": item.found.setting,
        "table": item.found.table(),
        "figures": _marked(figures.few_shot(item.found, name)),
    }


def _part(item: Section, name: str, pictures: Thumbnails) -> dict[str, Any]:
    """Collect what the template shows of one run or sweep."""
    source, examples = item.source, item.examples
    part: dict[str, Any] = {
        "id": name,
        "name": source.name,
        "path": str(source.path),
        "is_sweep": isinstance(source, Sweep),
        "facts": tables.facts(source),
        "settings": tables.settings(source),
        "state": _state(source),
        "curves": _marked(figures.learning(source, name)),
        "strength": _marked(figures.strength(source, name)),
        "evaluations": source.measured if isinstance(source, Run) else (),
        "kept": source.best_epoch if isinstance(source, Run) else None,
        "task": source.task,
        "of": _examples_of(item),
        "examples": examples,
        "forgotten": item.forgotten,
        "tested": on_test_data(source) if isinstance(source, Sweep) else None,
    }
    if examples is not None:
        part["queries"] = [_query(query, examples, pictures) for query in examples.queries]
        part["heat"] = _marked(figures.heat_maps(examples, name))
        part["heat_rows"] = [
            (_picture(examples.images[image], text, pictures), text)
            for image, text in zip(examples.heat.images, examples.heat.texts, strict=True)
        ]
        part |= _classes(examples, name, pictures)
        part["errors"] = None if examples.errors is None else _errors(examples.errors, pictures)
    return part


def _classes(examples: Examples, name: str, pictures: Thumbnails) -> dict[str, Any]:
    classes = examples.classes
    if classes is None:
        return {"classes": None}
    matrices, left_out = figures.confusions(classes, name)
    rows = []
    for place, label in enumerate(classes.names):
        counts = (classes.base[place], classes.adapted[place])
        total = sum(counts[1])
        recalls = [row[place] / total if total else None for row in counts]
        guesses = sum(row[place] for row in classes.adapted)
        precision = counts[1][place] / guesses if guesses else None
        rows.append({"name": label, "count": total, "recalls": recalls, "precision": precision})
    pairs = [
        {
            "true": classes.names[pair.true],
            "taken": classes.names[pair.taken_for],
            "base": pair.base,
            "adapted": pair.adapted,
            "pictures": [
                _picture(examples.images[image], f"{classes.names[pair.true]}, mistaken", pictures)
                for image in pair.images
            ],
        }
        for pair in classes.pairs
    ]
    wide = len(classes.names) > 12
    return {
        "classes": classes,
        "confusions": _marked(matrices),
        "left_out": left_out,
        "class_rows": rows,
        "pairs": pairs,
        "wide": wide,
    }


def _errors(errors: RetrievalErrors, pictures: Thumbnails) -> dict[str, Any]:
    """Collect the captions that are listed, with their pictures, and the groups."""
    lists = (
        ("Worst captions", "Captions whose image is not first with the adapted model", errors.worst),
        (
            "Better than before",
            "Captions whose image has a higher place with the adapted model than with the base",
            errors.better,
        ),
        (
            "Worse than before",
            "Captions whose image has a lower place with the adapted model than with the base",
            errors.worse,
        ),
    )
    return {
        "captions": errors.captions,
        "first": errors.first,
        "lists": [
            (title, what, part.total, [_asked(asked, pictures) for asked in part.listed])
            for title, what, part in lists
        ],
        "groups": [("By length", errors.by_length), ("By word", errors.by_word)],
    }


def _asked(asked: Asked, pictures: Thumbnails) -> dict[str, Any]:
    return {
        "caption": asked.caption,
        "right": _picture(asked.image, f"the right image of: {asked.caption}", pictures),
        "answers": [
            (name, answer, _picture(answer.wrong, f"the nearest wrong image, {name}", pictures))
            for name, answer in ((name, asked.answers[name]) for name in MODELS)
        ],
    }


def _query(query: Any, examples: Examples, pictures: Thumbnails) -> dict[str, Any]:
    def row(found: Found) -> dict[str, Any]:
        cells = []
        for place, (image, score) in enumerate(zip(found.images, found.scores, strict=True), start=1):
            hit = image == query.image
            text = f"place {place}{', the true image' if hit else ''}, similarity {score:.2f}"
            cells.append({"picture": _picture(examples.images[image], text, pictures), "hit": hit})
        return {"rank": found.rank, "cells": cells}

    return {
        "caption": query.caption,
        "kind": query.kind,
        "hidden": any(query.image not in found.images for found in (query.base, query.adapted)),
        "truth": _picture(examples.images[query.image], f"the true image of: {query.caption}", pictures),
        "rows": [("base", row(query.base)), ("adapted", row(query.adapted))],
    }


def _picture(path: str, text: str, pictures: Thumbnails) -> dict[str, Any]:
    return {"thumbnail": pictures.get(path), "text": text, "file": Path(path).name}


def _marked(drawn: Sequence[figures.Figure]) -> list[dict[str, Any]]:
    return [{"svg": Markup(figure.svg), "caption": figure.caption} for figure in drawn]


def _state(source: Run | Sweep) -> str:
    """Say how far an unfinished run or sweep has come; empty for a finished one."""
    if isinstance(source, Run):
        return "" if source.finished else progress_of(source)
    if not source.unfinished:
        return ""
    return f"unfinished: {len(source.unfinished)} cells under way ({', '.join(source.unfinished[:4])})"


def _examples_of(item: Section) -> str:
    """Name the run that the examples are of; for a sweep that of its best adapter."""
    if isinstance(item.source, Sweep) and item.run is not None:
        return f"{item.source.name}: its best adapter, {item.run.name}"
    return item.source.name


SIDE = 112
_QUALITY = 76
_BACKGROUND = (255, 255, 255)


@dataclass(frozen=True)
class Thumbnail:
    """A picture of the page: its element id, its size in pixels and its data URI."""

    id: str
    width: int
    height: int
    uri: str


class Thumbnails:
    """Thumbnails of image files, each file once; counts those that cannot be read."""

    def __init__(self) -> None:
        self._by_path: dict[str, Thumbnail | None] = {}
        self._by_content: dict[bytes, Thumbnail] = {}

    def get(self, path: str) -> Thumbnail | None:
        """The thumbnail of a file; None if the file is not there or is no image."""
        if path not in self._by_path:
            self._by_path[path] = self._make(path)
        return self._by_path[path]

    def all(self) -> list[Thumbnail]:
        """All thumbnails, each once."""
        return list(self._by_content.values())

    @property
    def missing(self) -> list[str]:
        """Files from which no thumbnail could be made."""
        return [path for path, made in self._by_path.items() if made is None]

    def _make(self, path: str) -> Thumbnail | None:
        try:
            try:
                with open_bytes(path) as file, Image.open(file) as opened:
                    picture = ImageOps.exif_transpose(opened).convert("RGBA")
            except UnidentifiedImageError:  # a HEIC photo, which Pillow alone does not know
                picture = open_image(Path(path)).convert("RGBA")
        except (OSError, ValueError, TarError, DataError, Image.DecompressionBombError):
            return None
        picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        flat = Image.new("RGB", picture.size, _BACKGROUND)
        flat.paste(picture, mask=picture.getchannel("A"))
        buffer = io.BytesIO()
        flat.save(buffer, "JPEG", quality=_QUALITY, optimize=True)
        content = buffer.getvalue()
        if content not in self._by_content:
            uri = f"data:image/jpeg;base64,{base64.b64encode(content).decode('ascii')}"
            number = len(self._by_content) + 1
            self._by_content[content] = Thumbnail(f"picture-{number}", flat.width, flat.height, uri)
        return self._by_content[content]
