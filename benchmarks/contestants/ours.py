"""clipgraft, through its public names only."""

from __future__ import annotations

import json
import logging
import re
import shutil
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

import clipgraft as cg
from benchmarks.child import reset_peak
from benchmarks.prepare import LORA, OPENCLIP_BASE

_EPOCH_END = r"epoch \d+ of \d+: mean loss"


class _LogClock(logging.Handler):
    """Record when lines that begin with a pattern are logged."""

    def __init__(self, pattern: str) -> None:
        super().__init__()
        self.times: list[float] = []
        self._pattern = re.compile(pattern)

    def emit(self, record: logging.LogRecord) -> None:
        if self._pattern.match(record.getMessage()):
            self.times.append(time.perf_counter())


@contextmanager
def log_clock(pattern: str) -> Iterator[_LogClock]:
    """Record when clipgraft logs lines that begin with a pattern."""
    clock, log = _LogClock(pattern), logging.getLogger("clipgraft")
    log.addHandler(clock)
    try:
        yield clock
    finally:
        log.removeHandler(clock)


def load(precision: str = "fp32") -> cg.Clip:
    """Load the random ViT-B-32 that all contestants share."""
    return cg.load("ViT-B-32", pretrained=OPENCLIP_BASE, precision=precision)


def timed_fit(
    clip: cg.Clip, pairs: cg.Pairs, train: cg.TrainArgs, features: cg.FeatureArgs
) -> dict[str, Any]:
    """Run `fit` in a new folder; returns the seconds of every epoch and the loss of every step."""
    reset_peak()
    with tempfile.TemporaryDirectory() as folder, log_clock(_EPOCH_END) as clock:
        started = time.perf_counter()
        run = cg.RunArgs(out=Path(folder) / "run", progress=False, save_frequency=0)
        result = cg.fit(clip, pairs, train=train, run=run, features=features)
        total = time.perf_counter() - started
        lines = (Path(folder) / "run" / "events.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    starts = [started, *clock.times]
    trained = [event for event in events if event["kind"] == "train"]
    return {
        "epoch_seconds": [end - start for start, end in zip(starts, clock.times, strict=False)],
        "run_seconds": total,
        "losses": [event["loss"] for event in trained],
        "pairs_per_second": [event["pairs_per_second"] for event in trained],
        "trained": result.trainable,
    }


def train(
    table: str,
    *,
    targets: str,
    batch_size: int,
    epochs: int,
    autocast: bool = False,
    precision: str = "fp32",
    dropout: float = 0.1,
    rows: int | None = None,
    fit: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Run `apply_lora` and `fit` on the photographs; other options have their defaults."""
    import torch

    clip = load(precision)
    torch.manual_seed(0)
    cg.apply_lora(clip, **LORA, dropout=dropout, targets=targets)
    pairs = cg.read_pairs(table, verify="header")
    if rows is not None:
        pairs = cg.Pairs(pairs.images[:rows], pairs.captions[:rows])
    return timed_fit(
        clip,
        pairs,
        cg.TrainArgs(batch_size=batch_size, epochs=epochs, lr_scheduler="const", warmup=0, **(fit or {})),
        cg.FeatureArgs(autocast=autocast),
    )


def train_steps(*, batch_size: int, warmup: int, steps: int, **options: Any) -> dict[str, Any]:
    """Train as many steps as a peer, waiting for data included; `options` are those of `train`."""
    values = train(batch_size=batch_size, epochs=1, rows=batch_size * (warmup + steps), **options)
    seconds = [batch_size / speed for speed in values["pairs_per_second"]]
    return {
        "step_seconds": seconds[warmup:],
        **{name: values[name] for name in ("losses", "trained", "pairs_per_second")},
    }


def encode(images: list[str], autocast: bool = False, int8: bool = False) -> dict[str, Any]:
    """Run `encode_images` over a list of files."""
    from benchmarks.contestants.encoding import timed_encoding
    from clipgraft.data.features import encode_images
    from clipgraft.engine.encoder import Encoder

    clip = load()
    encoder = Encoder(clip, autocast, int8=int8)
    return timed_encoding(
        lambda paths: encode_images(clip, [Path(path) for path in paths], encoder=encoder), images
    )


def encode_to_disk(images: list[str], source: str = "table", autocast: bool = False) -> dict[str, Any]:
    """Run `encode_folder` over files, and read vectors, metadata and manifest back.

    `source` is how they are given: `folder`, `tar`, or a `table` or `parquet` file of paths.
    """
    from benchmarks.contestants.encoding import timed_encoding

    clip = load()

    def run(paths: list[str]) -> Tensor:
        with tempfile.TemporaryDirectory() as folder:
            given, out = _given(paths, source, Path(folder)), Path(folder) / "out"
            cg.search.encode_folder(clip, given, out, autocast=autocast)
            rows = pq.read_table(out / "metadata" / "metadata_0.parquet")["path"].to_pylist()
            vectors = np.load(out / "img_emb" / "img_emb_0.npy")
        place = {Path(path.rpartition("::")[2]).stem: row for row, path in enumerate(rows)}
        return torch.from_numpy(vectors[[place[Path(path).stem] for path in paths]])

    return timed_encoding(run, images)


def _given(paths: list[str], source: str, folder: Path) -> Path:
    """Make the source of images, which takes no time beside encoding them."""
    made = folder / {"table": "images.csv", "parquet": "images.parquet", "tar": "images.tar"}.get(
        source, source
    )
    if source == "table":
        made.write_text("\n".join(["filepath", *paths]) + "\n", encoding="utf-8")
    elif source == "parquet":
        pq.write_table(pa.table({"filepath": paths}), made)
    elif source == "tar":
        with tarfile.open(made, "w") as archive:
            for path in paths:
                archive.add(path, Path(path).name)
    else:
        made.mkdir()
        for path in paths:
            shutil.copy(path, made)
    return made


def retrieval(rows: int, images: int, captions_an_image: int, seed: int) -> dict[str, Any]:
    """Run `retrieval_metrics` on made-up features."""
    from benchmarks.contestants.retrieval import made_up_features

    features = made_up_features(rows, images, captions_an_image, seed)
    reset_peak()
    started = time.perf_counter()
    metrics = cg.evaluate.retrieval_metrics(*features)
    return {"seconds": time.perf_counter() - started, "metrics": metrics}
