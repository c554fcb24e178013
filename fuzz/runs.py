"""Readers of what runs leave: records in reports and resumed runs, sweeps, cached features."""

from __future__ import annotations

import functools
import hashlib
import json
import zlib
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from clipgraft.adapters.folder import write_adapter
from clipgraft.data.feature_cache import FeatureCache, FeatureKey
from clipgraft.engine import attention
from clipgraft.files import write_json
from clipgraft.report import charts, page
from clipgraft.report.examples import (
    EXAMPLES_FILE,
    Classes,
    Examples,
    Found,
    Pair,
    Query,
    Similarities,
    store_examples,
    stored_examples,
)
from clipgraft.report.page import Section
from clipgraft.report.runs import Run, read_sources, run_of
from clipgraft.train.args import RunArgs
from clipgraft.train.cells import write_finished
from clipgraft.train.checkpoint import Position
from clipgraft.train.run_folder import RunFolder
from clipgraft.train.sweep import Cell, CellResult, read_cell
from fuzz.mutate import damaged, odd_json
from fuzz.subject import Subject
from fuzz.tables import pictures
from fuzz.weights import make_adapter

METRICS = {
    "image_to_text_R@1": 0.5,
    "image_to_text_R@5": 0.9,
    "text_to_image_R@1": 0.4,
    "text_to_image_R@5": 0.8,
}
NOON = datetime(2024, 5, 31, 12)
PARAMS: dict[str, Any] = {
    "model": "emoji",
    "lr": 1e-3,
    "epochs": 2,
    "lora_r": 4,
    "use_lora": True,
    "val_data": "v.csv",
    "seed": 0,
}
EVENTS: list[dict[str, Any]] = [
    {"kind": "train", "step": 1, "loss": 2.5, "lr": 1e-3, "epoch": 1},
    {"kind": "train", "step": 2, "loss": 2.0, "lr": 1e-3, "epoch": 1},
    {"kind": "val", "step": 2, "epoch": 1, **METRICS},
]
RESULTS = {"trainable": 100, "bytes": 4000, "seconds": 12.5, "saved": "adapter", "history": [METRICS]}
_environment = functools.cache(page._environment)  # compiling the template is slow too
LOG = "2024-05-31 12:00:00,000 | INFO | started\n2024-05-31 12:10:00,000 | INFO | saved\n"


def render(shown: Section, with_examples: bool = False) -> str:
    """Render the page of one run or sweep, with placeholders for its slow plots."""

    def drawn(*_: object, **__: object) -> str:
        return "<svg></svg>"

    plots: dict[str, Any] = dict.fromkeys(
        ("curves", "loss", "against_weights", "by_targets", "matrix"), drawn
    )
    with mock.patch.multiple(charts, **plots), mock.patch.object(page, "_environment", _environment):
        return page.render([shown], with_examples=with_examples, retained="", now=NOON)


def _lines(values: Any) -> str:
    return "".join(json.dumps(value) + "\n" for value in (values if isinstance(values, list) else [values]))


def _put(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def run_files(folder: Path) -> None:
    """Write a finished run."""
    folder.mkdir(parents=True)
    write_json(folder / "params.json", PARAMS)
    (folder / "params.txt").write_text("".join(f"{key}: {value}\n" for key, value in PARAMS.items()))
    write_json(folder / "results.json", RESULTS)
    (folder / "events.jsonl").write_text(_lines(EVENTS))
    (folder / "out.log").write_text(LOG)
    write_adapter(make_adapter(folder / "adapter"), folder / "adapter")


def report(folder: Path) -> Subject:
    """Damage the files of a run and make its page."""
    run_files(folder)

    def read() -> object:
        sources = read_sources([folder])
        assert isinstance(sources[0], Run)
        return render(Section(sources[0], None, None, None, ()))

    def params_txt(rng: Random) -> None:
        (folder / "params.json").unlink()
        (folder / "params.txt").write_bytes(damaged((folder / "params.txt").read_bytes(), rng))

    breaks: list[Callable[[Random], None]] = [
        lambda rng: _put(folder / "params.json", odd_json(PARAMS, rng)),
        lambda rng: _put(folder / "results.json", odd_json(RESULTS, rng)),
        lambda rng: _put(folder / "events.jsonl", odd_json(EVENTS, rng, _lines)),
        lambda rng: _put(folder / "out.log", damaged(LOG.encode(), rng)),
        params_txt,
    ]
    return Subject(folder, read, breaks)


def resume(folder: Path) -> Subject:
    """Damage the events that a resumed run reads."""
    run_files(folder)

    def read() -> object:
        with RunFolder(RunArgs(out=folder, resume=True), PARAMS) as opened:
            opened.start(Position(1, 0, 2))
            return opened.history()

    def change(rng: Random) -> None:
        (folder / "events.jsonl").write_bytes(odd_json(EVENTS, rng, _lines))

    return Subject(folder, read, [change])


def sweep(folder: Path) -> Subject:
    """Damage cells and table of a sweep, make its page, and read them to continue."""
    cells = [
        Cell("base"),
        Cell("full"),
        *(Cell("lora", "text-attention", r, s) for r in (2, 4) for s in (0, 1)),
    ]
    settings = {"epochs": 2, "lr": 1e-3, "metrics": list(METRICS)}
    for cell in cells:
        write_finished(folder / "cells" / cell.name, CellResult(cell, METRICS, 10, 100, 1.5, 300.0), settings)
    names = [f"cells/{cell.name}/cell.json" for cell in cells]
    rows = [
        {
            "kind": "lora",
            "targets": "text-attention",
            "r": 2,
            "seeds": 1,
            "mean": METRICS,
            "deviation": METRICS,
        }
        | {"trained": 10, "bytes": 100.0, "seconds": 1.5, "peak_mb": 300.0}
    ]
    write_json(folder / "table.json", {"metrics": list(METRICS), "rows": rows})
    whole = {name: json.loads((folder / name).read_text()) for name in (*names, "table.json")}

    def read() -> object:
        for cell in cells:
            read_cell(folder / "cells" / cell.name, settings)
        (source,) = read_sources([folder])
        shown = Section(source, run_of(source), None, None, ())
        return render(shown)

    def table_alone(rng: Random) -> None:
        for name in names:
            (folder / name).unlink()
        (folder / "table.json").write_bytes(odd_json(whole["table.json"], rng))

    def one_cell(rng: Random) -> None:
        name = rng.choice((*names, "table.json"))
        (folder / name).write_bytes(odd_json(whole[name], rng))

    return Subject(folder, read, [one_cell, table_alone])


def cache(folder: Path) -> Subject:
    """Damage the feature cache, also index heads with a matching digest; damaged parts are computed again."""
    place = pictures(folder.parent / "home" / "pictures")
    paths = sorted(place.iterdir())
    key = FeatureKey("0123456789abcdef", "resize", "image features", "fp32")
    features = FeatureCache(folder)

    def compute(wanted: Sequence[Path], add: Callable[[Tensor], None]) -> None:
        add(torch.ones(len(wanted), 4))

    def read() -> object:
        rows = features.get_or_compute(key, paths, compute)
        assert rows.tensor().shape == (len(paths), 4)
        return rows

    read()
    (index,) = folder.glob("*/*.index")
    data, content = index.with_suffix(".npy"), index.read_bytes()[:-16]
    line, _, ids = content.partition(b"\n")
    array = data.read_bytes()

    def sealed(body: bytes) -> bytes:
        return body + hashlib.blake2b(body, digest_size=16).digest()

    def head(rng: Random) -> None:
        index.write_bytes(sealed(odd_json(json.loads(line), rng).replace(b"\n", b" ") + b"\n" + ids))

    def strange_ids(rng: Random) -> None:
        index.write_bytes(sealed(line + b"\n" + damaged(ids, rng)))

    def strange_array(rng: Random) -> None:
        body = damaged(array, rng)
        known = json.loads(line) | {"bytes": len(body), "crc32": zlib.crc32(body)}
        index.write_bytes(sealed(json.dumps(known).encode() + b"\n" + ids))
        data.write_bytes(body)

    def entry(rng: Random) -> None:
        (index.parent / "clipgraft-features.json").write_bytes(damaged(b"{}", rng))
        index.write_bytes(damaged(index.read_bytes(), rng))

    return Subject(folder, read, [head, strange_ids, strange_array, entry])


def kept(folder: Path) -> Subject:
    """Damage small records that are rebuilt when wrong: examples of a report, attention kernels."""
    run_files(folder)
    (run,) = read_sources([folder])
    assert isinstance(run, Run)
    found = Found(1, (0,), (0.5,))
    heat = Similarities((0,), ("a",), (0,), ((0.5,),), ((0.5,),))
    classes = Classes(("a", "b"), ((1, 0), (0, 1)), ((1, 0), (0, 1)), (Pair(0, 1, 1, 1, (0,)),))
    queries = (Query("a", 0, "fixed", found, found),)
    counts = {"fixed": 1, "broken": 0, "both right": 0, "both wrong": 0}
    for more in (None, classes):
        examples = Examples("retrieval", METRICS, METRICS, 1, 0, counts, ("a.png",), queries, heat, more)
        store_examples(run, examples)
    value = json.loads((folder / EXAMPLES_FILE).read_text())
    choices = {"here": {"float32 2 77": "math"}}
    write_json(folder / "attention.json", choices)

    def read() -> object:
        known = attention._read(folder / "attention.json")
        assert all(isinstance(name, str) for keys in known.values() for name in keys.values())
        again = stored_examples(run)
        if again is None:
            return None
        shown = Section(run, run, again, None, ())
        return render(shown, with_examples=True)

    breaks: list[Callable[[Random], None]] = [
        lambda rng: _put(folder / EXAMPLES_FILE, odd_json(value, rng)),
        lambda rng: _put(folder / "attention.json", odd_json(choices, rng)),
    ]
    return Subject(folder, read, breaks)


READERS: dict[str, Callable[[Path], Subject]] = {
    "runs.report": report,
    "runs.resume": resume,
    "runs.sweep": sweep,
    "runs.cache": cache,
    "runs.kept": kept,
}
