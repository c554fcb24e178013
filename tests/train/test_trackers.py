"""Trackers: what they receive of a run, and that none of them can stop or hold up one."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import clipgraft as cg
from clipgraft.train import trackers
from clipgraft.train.args import RunArgs
from clipgraft.train.checkpoint import Position
from clipgraft.train.run_folder import RunFolder, read_events
from clipgraft.train.trackers import KINDS, Kind, TrackedRun, Tracker

# In a process of its own: these libraries print, start services and hook into the interpreter.
RUN = """
import sys
from pathlib import Path
from clipgraft.train.args import RunArgs
from clipgraft.train.checkpoint import Position
from clipgraft.train.run_folder import RunFolder

out, tracker, resume = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "resume"
args = RunArgs(out=out, resume=resume, track=tracker, track_project="photos")
with RunFolder(args, {"lr": 0.5, "targets": ["text.*.q"], "source": {}}) as folder:
    first = 2 if resume else 0
    folder.start(Position(epoch=0, step_in_epoch=first, step=first))
    for step in (first + 1, first + 2):
        folder.event("train", step, {"loss": 1 / step})
    folder.event("val", first + 2, {"image_to_text_R@1": 0.25})
    folder.finish({"best_epoch": 1, "seconds": 2.5, "saved": "x"})
"""


def run(out: Path, tracker: str, *more: str, **environment: str) -> None:
    """Report a run of two steps, or its next two, to one tracker; fails where anything was lost."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(out), tracker, *(more or ("new",))],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "goes on without" not in (out / "out.log").read_text(), (out / "out.log").read_text()


def test_mlflow_has_every_number_of_a_run_and_of_its_resume(tmp_path: Path) -> None:
    """Whoever compares runs in MLflow misses values or settings, or a resumed run is two runs there."""
    from mlflow import MlflowClient

    store = (tmp_path / "store").as_uri()
    environment = {"MLFLOW_TRACKING_URI": store, "MLFLOW_ALLOW_FILE_STORE": "true"}
    run(tmp_path / "vi", "mlflow", **environment)
    run(tmp_path / "vi", "mlflow", "resume", **environment)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        client = MlflowClient(store)
        experiment = client.get_experiment_by_name("photos")
        assert experiment is not None
        (found,) = client.search_runs([experiment.experiment_id])
        losses = client.get_metric_history(found.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in losses] == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25)]
    assert found.data.params == {"lr": "0.5", "targets": '["text.*.q"]', "source": "{}"}
    assert found.data.metrics["val/image_to_text_R_at_1"] == 0.25
    assert found.data.metrics["best_epoch"] == 1
    assert (found.info.run_name, found.info.status) == ("vi", "FINISHED")


def leveldb_records(log: bytes) -> Iterator[bytes]:
    """Yield the records of a LevelDB log, whose blocks of 32 KiB hold pieces of (checksum, length, kind)."""
    record, place = b"", 0
    first = 7  # of wandb's own header in the first block
    while place + 7 <= len(log):
        if (left := 32768 - (place + first) % 32768) < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", log, place)
        record += log[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def test_wandb_offline_has_every_number(tmp_path: Path) -> None:
    """`--track wandb` on a machine without a network loses the run."""
    from wandb.proto import wandb_internal_pb2

    run(tmp_path / "vi", "wandb", WANDB_MODE="offline", WANDB_SILENT="true")
    (file,) = (tmp_path / "vi" / "wandb").glob("offline-run-*/*.wandb")
    rows, settings = [], {}
    for data in leveldb_records(file.read_bytes()[7:]):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            rows.append(
                {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            )
        if record.HasField("run"):
            settings = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            assert (record.run.project, record.run.display_name) == ("photos", "vi")
    assert [row["train/loss"] for row in rows if "train/loss" in row] == [1.0, 0.5]
    assert [row["val/image_to_text_R@1"] for row in rows if "val/image_to_text_R@1" in row] == [0.25]
    assert settings["lr"] == 0.5


@pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="needs trackio")
def test_trackio_has_every_number_of_a_run_and_of_its_resume(tmp_path: Path) -> None:
    """Trackio's page of a run lacks values, or a resumed run is two runs there."""
    import sqlite3

    environment = {"TRACKIO_DIR": str(tmp_path / "store")}
    run(tmp_path / "vi", "trackio", **environment)
    run(tmp_path / "vi", "trackio", "resume", **environment)
    with sqlite3.connect(tmp_path / "store" / "photos.db") as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    reports = [(name, step, json.loads(values)) for name, step, values in rows]
    losses = [(name, step, values["train/loss"]) for name, step, values in reports if "train/loss" in values]
    assert losses == [("vi", 1, 1.0), ("vi", 2, 0.5), ("vi", 3, 1 / 3), ("vi", 4, 0.25)]


class Recorded:
    """A tracker that keeps what it is sent, or fails, or never returns."""

    def __init__(self, fails: str = "", waits: threading.Event | None = None) -> None:
        self.values: list[tuple[dict[str, float], int]] = []
        self.closed: tuple[dict[str, float], bool] | None = None
        self.fails, self.waits = fails, waits

    def open(self, run: TrackedRun) -> Tracker:
        if self.fails == "open":
            raise RuntimeError("no server\nat all")
        return self

    def log(self, values: Mapping[str, float], step: int) -> None:
        if self.waits is not None:
            self.waits.wait()
        if self.fails == "log":
            raise SystemExit(3)
        self.values.append((dict(values), step))

    def close(self, summary: Mapping[str, float], failed: bool) -> None:
        self.closed = (dict(summary), failed)


def report(out: Path, patch: pytest.MonkeyPatch, **kinds: Recorded) -> None:
    """Report a run of three steps to made-up trackers."""
    patch.setattr(trackers, "KINDS", {**KINDS, **{name: Kind("json", k.open) for name, k in kinds.items()}})
    args = RunArgs(out=out).replace(track=tuple(kinds))
    with RunFolder(args, {"source": {}}) as folder:
        folder.start(Position(epoch=0, step_in_epoch=0, step=0))
        for step in (1, 2, 3):
            folder.event("train", step, {"loss": float(step)})
        folder.finish({"best_epoch": 2, "saved": "x", "applied": True})


@pytest.mark.parametrize("fails", ["open", "log"])
def test_a_tracker_that_fails_is_told_once_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fails: str
) -> None:
    """A tracking server that is down ends a training run, or fills its log with the same line."""
    bad, good = Recorded(fails), Recorded()
    with caplog.at_level(logging.INFO, "clipgraft"):
        report(tmp_path / "run", monkeypatch, mlflow=bad, wandb=good)
    (warned,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    what = "mlflow: RuntimeError: no server | at all" if fails == "open" else "mlflow: SystemExit: 3"
    assert warned == f"{what}; the run goes on without it, and events.jsonl has every number"
    assert good.values == [({"train/loss": float(step)}, step) for step in (1, 2, 3)]
    assert good.closed == ({"best_epoch": 2.0}, False)
    assert len(read_events(tmp_path / "run" / "events.jsonl")) == 3


def test_a_tracker_that_hangs_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A tracking server that accepts and never answers holds up a training run for ever."""
    monkeypatch.setattr(trackers, "_PATIENCE", 0.2)
    hangs = threading.Event()
    with caplog.at_level(logging.INFO, "clipgraft"):
        report(tmp_path / "run", monkeypatch, mlflow=Recorded(waits=hangs))
    hangs.set()
    assert "mlflow: has not taken the last 4 of this run's reports" in caplog.text


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run trains for hours and only then says that nothing was tracked."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        cg.errors.ConfigError, match=r"`track=wandb` needs wandb: pip install 'clipgraft\[wandb\]'"
    ):
        RunFolder(RunArgs(out=tmp_path / "run", track=("wandb",)), {"source": {}})
    assert not (tmp_path / "run").exists()


def test_none_is_no_tracker(tmp_path: Path) -> None:
    """`--track none` is refused, or writes TensorBoard's files all the same."""
    args = RunArgs.model_validate({"out": tmp_path / "run", "track": "none"})
    with RunFolder(args, {"source": {}}) as folder:
        folder.start(Position(epoch=0, step_in_epoch=0, step=0))
        folder.event("train", 1, {"loss": 1.0})
    assert args.track == ()
    assert not (tmp_path / "run" / "tensorboard").exists()
