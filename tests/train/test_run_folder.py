"""The run folder: its log, its events, and what is in the way of a new run."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

import pytest

import clipgraft as cg
from clipgraft.train.args import RunArgs
from clipgraft.train.checkpoint import Position
from clipgraft.train.run_folder import RunFolder, early_lines, refuse_used

log = logging.getLogger("clipgraft")


def open_run(path: Path, resume: bool = False) -> RunFolder:
    return RunFolder(RunArgs(out=path, resume=resume), {"lr": 1e-3, "name": "thử", "source": {}})


def test_out_log_begins_with_what_came_before_the_folder(tmp_path: Path) -> None:
    """What was read from the user's table is printed before the run folder exists; out.log must have it."""
    log.setLevel(logging.INFO)
    try:
        with early_lines():
            log.info("12 images")
            with open_run(tmp_path / "run"):
                log.info("epoch 1")
        log.info("after the run")
    finally:
        log.setLevel(logging.NOTSET)
    lines = (tmp_path / "run" / "out.log").read_text(encoding="utf-8").splitlines()
    assert [line.split(" | ")[-1] for line in lines] == ["12 images", "epoch 1"]


def test_early_lines_without_a_run_leave_nothing(tmp_path: Path) -> None:
    """A command that fails before its run must not hold memory or handlers."""
    handlers = list(log.handlers)
    with early_lines():
        log.warning("lost")
    assert log.handlers == handlers


def test_a_failure_is_the_last_line_of_out_log(tmp_path: Path) -> None:
    """Next morning, out.log is where one looks for why the run ended."""

    def fail() -> None:
        with open_run(tmp_path / "run"):
            raise cg.errors.TrainingError("the loss is nan at step 3")

    with pytest.raises(cg.errors.TrainingError):
        fail()
    last = (tmp_path / "run" / "out.log").read_text(encoding="utf-8").splitlines()[-1]
    assert last.endswith("| ERROR | TrainingError: the loss is nan at step 3")
    assert not any(isinstance(handler, logging.FileHandler) for handler in log.handlers)


def test_logging_level_is_given_back(tmp_path: Path) -> None:
    """`fit` in a program with its own logging must not turn on lines for the rest of it."""
    before = log.level
    with open_run(tmp_path / "run"):
        assert log.isEnabledFor(logging.INFO)
    assert log.level == before


def test_events_go_on_from_the_checkpoint(tmp_path: Path) -> None:
    """Steps that are trained again would be reported twice, and plotted as a zigzag."""
    with open_run(tmp_path / "run") as run:
        run.start(Position())
        for step in (1, 2, 3):
            run.event("train", step, {"loss": float(step)})
        run.event("val", 3, {"epoch": 1, "R@1": 0.5})
        run.event("train", 4, {"loss": 4.0})
    for position, kept in (
        (Position(0, 3, 3), 3),  # after the last step, before its evaluation counts
        (Position(0, 2, 2), 2),
        (Position(0, 0, 0), 0),
    ):
        with open_run(tmp_path / "run", resume=True) as run:
            run.start(position)
            assert len((tmp_path / "run" / "events.jsonl").read_text().splitlines()) == kept
            assert run.history() == []


def test_an_evaluated_epoch_is_kept(tmp_path: Path) -> None:
    """The history of a resumed run must hold the epochs before it."""
    with open_run(tmp_path / "run") as run:
        run.start(Position())
        run.event("train", 1, {"loss": 1.0})
        run.event("val", 1, {"epoch": 1, "R@1": 0.5})
    with open_run(tmp_path / "run", resume=True) as run:
        run.start(Position(1, 0, 1))
        assert run.history() == [{"epoch": 1, "R@1": 0.5}]


def test_only_a_run_that_took_a_step_is_in_the_way(tmp_path: Path) -> None:
    """A run that failed on a typo must not take its name with it."""
    with open_run(tmp_path / "run"):
        pass
    refuse_used(tmp_path / "run", resume=False)
    with open_run(tmp_path / "run") as run:
        run.start(Position())
    with pytest.raises(cg.errors.ConfigError, match="exists already"):
        refuse_used(tmp_path / "run", resume=False)
    refuse_used(tmp_path / "run", resume=True)


def test_leftovers_of_a_kill_are_removed(tmp_path: Path) -> None:
    """Every kill in the middle of a write would leave a checkpoint's worth of rubbish."""
    with open_run(tmp_path / "run") as run:
        leftover = run.checkpoints / ".latest.pt.0123abcd.partial"
        leftover.mkdir()
        (leftover / ".lock").touch()
        (leftover / "new").mkdir()
        run.latest.touch()
    with open_run(tmp_path / "run", resume=True) as run:
        run.start(Position())
        assert list(run.checkpoints.iterdir()) == [run.latest]


def test_a_folder_that_cannot_be_made_names_the_flag(tmp_path: Path) -> None:
    """`--logs` on a file would end in a traceback."""
    (tmp_path / "file").touch()
    with pytest.raises(
        cg.errors.ConfigError, match=r"`out`: cannot make .*file/run/checkpoints: Not a directory"
    ):
        open_run(tmp_path / "file" / "run")


def test_parameters_with_names_that_are_no_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data folder unpacked from an old archive must not stop the run."""
    monkeypatch.setattr(log, "propagate", False)  # pytest cannot hand such a line on between processes
    name = os.fsdecode(b"\xe9")
    with RunFolder(RunArgs(out=tmp_path / "run"), {"train_data": name}):
        log.warning("reading %s", name)
    assert (tmp_path / "run" / "params.txt").read_text() == "train_data: \\udce9\n"
    assert "reading \\udce9" in (tmp_path / "run" / "out.log").read_text()


def test_two_runs_of_one_name_are_kept_apart(tmp_path: Path) -> None:
    """Two trainings, or a resume beside the live run, would mix their steps in one events.jsonl."""
    told = rf"run .*run is in use by process {os.getpid()} on .*: wait until it ends, or choose another name"
    with open_run(tmp_path / "run"):
        for resume in (False, True):
            with pytest.raises(cg.errors.BusyError, match=told):
                open_run(tmp_path / "run", resume)
            with pytest.raises(cg.errors.BusyError, match=told):
                refuse_used(tmp_path / "run", resume)
    with open_run(tmp_path / "run"):
        pass


def test_a_run_killed_before_its_first_checkpoint_starts_over(tmp_path: Path) -> None:
    """It could neither go on nor be started again."""
    with open_run(tmp_path / "run") as run:
        run.start(Position())
        run.event("train", 1, {"loss": 1.0})
    with open_run(tmp_path / "run", resume=True) as run:
        run.start(Position())
    assert (tmp_path / "run" / "events.jsonl").read_text() == ""


def test_a_refused_resume_touches_nothing(tmp_path: Path) -> None:
    """params.json would tell the settings of the run that was refused, and the report show them."""
    with open_run(tmp_path / "run") as run:
        run.start(Position())
        run.event("train", 1, {"loss": 1.0})
        run.latest.write_bytes(b"checkpoint")
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}

    def refuse() -> None:
        with RunFolder(RunArgs(out=tmp_path / "run", resume=True), {"lr": 2.0}):
            log.warning("settings differ")
            raise cg.errors.CheckpointError("lr was 0.001, now 2.0")

    with pytest.raises(cg.errors.CheckpointError):
        refuse()
    assert {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()} == before


def test_an_accepted_resume_has_the_lines_from_before_it_in_its_log(tmp_path: Path) -> None:
    """What was read and chosen for this part of the run would be missing in out.log."""
    with open_run(tmp_path / "run") as run:
        run.start(Position())
        run.latest.touch()
    for early in (True, False):
        before = early_lines() if early else contextlib.nullcontext()
        with before, open_run(tmp_path / "run", resume=True) as run:
            log.info("12 images, early %s", early)
            run.start(Position())
            log.info("epoch 1, early %s", early)
    lines = [line.split(" | ")[-1] for line in (tmp_path / "run" / "out.log").read_text().splitlines()]
    assert lines == [f"{what}, early {early}" for early in (True, False) for what in ("12 images", "epoch 1")]


@pytest.mark.parametrize("text", ["nan", "inf", "-3", "x", ""])
def test_seconds_that_cannot_be_read_are_none(text: str, tmp_path: Path) -> None:
    """A file that was cut short would make the total nan, or end the run."""
    with open_run(tmp_path / "run") as run:
        (tmp_path / "run" / "seconds.txt").write_text(text)
        assert run.seconds() == 0


def test_seconds_so_far(tmp_path: Path) -> None:
    """A resumed or extended run would report the time of its last part alone."""
    with open_run(tmp_path / "run") as run:
        assert run.seconds() == 0
        run.keep_seconds(12.5)
        assert run.seconds() == 12.5
        run.finish({"seconds": 14.25})
        assert run.seconds() == 14.25
    assert not (tmp_path / "run" / "seconds.txt").exists()


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", ["params.txt", "params.json", "out.log", "notes.md", "checkpoints/1.pt"])
def test_a_folder_of_a_user_is_left(name: str, resume: bool, tmp_path: Path) -> None:
    """A run named like a folder of open_clip's, or of anything, would write over its params.txt and logs."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text('{"lr": 1}')
    with pytest.raises(cg.errors.ConfigError, match=r"no run of clipgraft made \([^\n]+choose another `out`"):
        open_run(tmp_path, resume)
    assert [found for found in tmp_path.rglob("*") if found.is_file()] == [path]
    assert path.read_text() == '{"lr": 1}'


def test_an_adapter_of_others_in_a_run_is_found_before_training(tmp_path: Path) -> None:
    """The run would end with the error, or write over the adapter."""
    with open_run(tmp_path):
        pass
    refuse_used(tmp_path, False)  # killed before its first step: begun anew
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(cg.errors.AdapterError, match="adapter: this folder was not made by clipgraft"):
        refuse_used(tmp_path, False)
