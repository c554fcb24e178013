"""Several processes train what one trains, and end together."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import clipgraft as cg
import distributed_runs
from clipgraft.models.clip import Clip
from clipgraft.models.load import load
from clipgraft.train.distributed import ALONE, World, in_shares
from clipgraft.train.feed import Feed, MicroBatch
from clipgraft.train.strength import STRENGTHS
from tar_shards import write_shards

HELPERS = Path(__file__).parents[1] / "helpers"
OTHERS = tuple(name for name in distributed_runs.CASES if name not in distributed_runs.QUICK)


def launch(*arguments: object, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """Run a program under torchrun on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--nproc-per-node", processes, "--master-addr", "127.0.0.1", "--master-port", port, "--"]
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, flags), *map(str, arguments)]
    path = os.pathsep.join([str(Path(cg.__file__).parents[1]), str(HELPERS)])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False, timeout=300)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, tiny_config: Path, pictures: Path) -> Path:
    """What two processes made of the quick cases in `distributed_runs`."""
    return in_two_processes(tiny_config, pictures, tmp_path_factory.mktemp("both"), distributed_runs.QUICK)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory, tiny_config: Path, pictures: Path) -> Path:
    """The same of all other cases."""
    return in_two_processes(tiny_config, pictures, tmp_path_factory.mktemp("others"), OTHERS)


def in_two_processes(config: Path, table: Path, out: Path, names: Sequence[str]) -> Path:
    done = launch(HELPERS / "distributed_runs.py", config, table, out, *names)
    assert done.returncode == 0, done.stderr
    return out


def trained(run: Path) -> dict[str, torch.Tensor]:
    state = torch.load(run / "checkpoints" / "latest.pt", weights_only=True)
    return dict(state["weights"])


def events(run: Path) -> list[dict[str, Any]]:
    """What was reported, but for the time it took."""
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "pairs_per_second"} for line in lines]


def files(run: Path) -> list[str]:
    return sorted(str(f.relative_to(run)) for f in run.rglob("*") if f.is_file() and "tfevents" not in f.name)


def assert_close(found: Path, wanted: Path) -> None:
    """The same run, up to rounding."""
    ours, theirs = trained(found), trained(wanted)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert len(events(found)) == len(events(wanted))
    for mine, line in zip(events(found), events(wanted), strict=True):
        assert mine == pytest.approx(line, abs=1e-5)


@pytest.mark.parametrize("accum_freq", [1, 2])
def test_gradients_are_those_of_the_whole_batch(
    accum_freq: int, both: Path, tiny_config: Path, pictures: Path
) -> None:
    """Gradients that are averaged, or lack the negatives of other processes, train another model."""
    clip = load(str(tiny_config), "none")
    loss, wanted = distributed_runs.gradients(clip, pictures, ALONE, accum_freq)
    for rank in (0, 1):
        found_loss, found = torch.load(both / f"gradients-{accum_freq}-{rank}.pt", weights_only=True)
        torch.testing.assert_close(found_loss, loss, rtol=1e-5, atol=0, check_dtype=False)
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            error = (found[name] - gradient).norm() / gradient.norm().clamp_min(1e-12)
            assert error < 1e-5, f"{name}: {error:.1e}"


@pytest.mark.parametrize("name", distributed_runs.QUICK)
def test_two_processes_equal_one(
    name: str, both: Path, tiny_config: Path, pictures: Path, tmp_path: Path
) -> None:
    """Who adds a second GPU at the same global batch would get another model, or other metrics."""
    distributed_runs.run_case(name, tiny_config, pictures, tmp_path)
    assert_close(both / name, tmp_path / name)
    assert files(both / name) == files(tmp_path / name)
    assert len(list((both / name / "tensorboard").iterdir())) == 1, "rank 0 alone writes"


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_two_processes_equal_one_in_other_ways(
    name: str, others: Path, tiny_config: Path, pictures: Path, tmp_path: Path
) -> None:
    """Heads, galleries, stored activations, full fine-tuning or a teacher would train something else."""
    test_two_processes_equal_one(name, others, tiny_config, pictures, tmp_path)


@pytest.mark.slow
def test_shards_in_two_processes_equal_files_in_one(
    tiny_config: Path, pictures: Path, tmp_path: Path
) -> None:
    """Processes that share tar files would read other images than one process that has them as files."""
    pattern = write_shards(pictures, tmp_path / "shards")
    found = in_two_processes(tiny_config, Path(pattern), tmp_path, ["crops"])
    distributed_runs.run_case("crops", tiny_config, pictures, tmp_path / "one")
    assert_close(found / "crops", tmp_path / "one" / "crops")
    test_a_resumed_run_ends_with_the_same_bits(found)


def test_evaluation_is_shared(both: Path) -> None:
    """Every process would encode all validation images, which takes as long as one process takes."""
    shares = [json.loads((both / f"shares-crops-{rank}.json").read_text()) for rank in (0, 1)]
    base_and_epochs = 3
    assert shares == [[6] * (base_and_epochs + 2 * len(STRENGTHS))] * 2, (
        "metrics and answers of each strength"
    )


def test_a_resumed_run_ends_with_the_same_bits(both: Path) -> None:
    """Dropout, crops or the place in the epoch of some process would not be replayed."""
    resumed, whole = trained(both / "resumed"), trained(both / "whole")
    assert resumed.keys() == whole.keys()
    assert [name for name in whole if not torch.equal(resumed[name], whole[name])] == []
    assert events(both / "resumed") == events(both / "whole")


def test_one_process_goes_on_where_two_stopped(
    both: Path,
    tiny_config: Path,
    pictures: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run could not be finished on the one GPU that is left, or would silently become another one."""
    stopped = both / "left"

    def train(out: Path, **options: Any) -> None:
        clip = load(str(tiny_config), "none")
        distributed_runs.on_pairs(clip, pictures, out, ALONE, targets=distributed_runs.BOTH, **options)

    assert len(events(stopped)) == 6, "the base, four steps and one evaluation"
    with monkeypatch.context() as patch:
        patch.setattr(distributed_runs, "PAIRS_IN_A_STEP", 4)
        with pytest.raises(cg.errors.CheckpointError, match=r"pairs in a step \(was 8, now 4\)"):
            train(stopped, resume=True)
    train(tmp_path / "whole")
    train(stopped, resume=True, accum_freq=2)
    assert "this run had 2 processes and goes on with 1" in caplog.text
    assert_close(stopped, tmp_path / "whole")


@given(count=st.integers(0, 50), size=st.integers(1, 9))
def test_shares_are_a_partition(count: int, size: int) -> None:
    """An image would be encoded twice, or not at all, and metrics be those of other data."""
    parts = [range(count)[World(rank, size).share(count)] for rank in range(size)]
    assert [item for part in parts for item in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert len(parts[0]) == max(map(len, parts)), "rank 0 has work as soon as anyone has"


@pytest.mark.parametrize("pixels", [False, True])
def test_processes_share_each_batch_of_one(pixels: bool, pairs: cg.Pairs, clip: Clip) -> None:
    """Two processes would see a pair twice and others never, or other negatives than one process."""
    transform = clip.require_preprocess() if pixels else None
    whole = Feed(pairs, 8, 1, 3, transform, 0)
    parts = [Feed(pairs, 2, 2, 3, transform, 0, World(rank, 2)) for rank in (0, 1)]
    for start in (0, 1):
        batches = zip(whole.batches(1, start), *(part.batches(1, start) for part in parts), strict=True)
        for (one,), *shares in batches:
            mine = [pair for share in shares for micro in share for pair in ids(micro)]
            assert sorted(mine) == sorted(ids(one))


def ids(micro: MicroBatch) -> list[tuple[int, int]]:
    return list(zip(micro.image_ids.tolist(), micro.caption_ids.tolist(), strict=True))


def test_too_few_pairs_for_all_processes(pairs: cg.Pairs) -> None:
    """The number that is advised must be one that works."""
    with pytest.raises(cg.errors.DataError, match="`batch_size=9` x 3 processes: use `batch_size=8` or less"):
        Feed(pairs, 9, 1, 0, None, 0, World(0, 3))
    assert Feed(pairs, 8, 1, 0, None, 0, World(0, 3)).steps == 1


def test_alone_nothing_is_copied_or_sent() -> None:
    """Training in one process would pay for what it does not use."""
    rows = torch.arange(6.0).view(3, 2)
    assert in_shares(ALONE, [1, 2, 3], lambda items: rows) is rows
    assert ALONE.gather(rows) == [(rows,)]
    assert ALONE.on_rank0(lambda: 3) == 3
    assert (ALONE.any(True), ALONE.any(False)) == (True, False)
    before = torch.get_rng_state()
    ALONE.reseed(0, 1)
    ALONE.send([rows])
    ALONE.barrier()
    assert torch.equal(torch.get_rng_state(), before)


def test_streams_of_other_processes_differ() -> None:
    """Processes that drop the same weights at the same step would see less than they could."""
    drawn = set()
    for rank, step in ((1, 1), (2, 1), (1, 2)):
        World(rank, 3).reseed(0, step)
        drawn.add(torch.rand(1).item())
    World(1, 3).reseed(0, 1)
    assert len(drawn) == 3
    assert torch.rand(1).item() in drawn


def train_and_fail(how: str, at: int, out: Path, config: Path, table: Path) -> tuple[list[str], int]:
    """What clipgraft says on stderr when rank 1 fails at a step, and with what code that process ends."""
    flags = f"--model {config} --pretrained none --precision fp32 --use-lora --lora-r 2 --batch-size 4"
    command = [
        "train",
        "--train-data",
        table,
        "--logs",
        out,
        "--name",
        "run",
        "--epochs",
        500,
        *flags.split(),
    ]
    done = launch(
        HELPERS / "failing_process.py", how, 1, at, *command, "--checkpoint-steps", 2, "--workers", 0
    )
    assert done.returncode == 1, "torchrun's own code"
    assert "Traceback" not in done.stderr.split("torch/distributed")[0]
    # Both processes end, with the same code where neither was killed; torchrun names the one it saw first.
    code = re.search(r"failed \(exitcode: (-?\d+)\) local_rank: \d ", done.stderr)
    lines = [line for line in done.stderr.splitlines() if line.startswith("clipgraft: ")]
    return lines, int(code.group(1)) if code else 0


def steps_saved(run: Path) -> int:
    state = torch.load(run / "checkpoints" / "latest.pt", weights_only=True)
    return int(state["position"]["step"])


@pytest.mark.slow
def test_a_killed_process_ends_the_run(tmp_path: Path, tiny_config: Path, pictures: Path) -> None:
    """A run whose process the system has killed would hang for ever, or end with a page that says nothing."""
    (line,), code = train_and_fail("killed", 5, tmp_path, tiny_config, pictures)
    assert re.match(r"clipgraft: rank 1 of 2 \(.+, process \d+\) has died", line)
    assert "go on with: torchrun --nproc-per-node 2 -m -- clipgraft train" in line
    assert line.endswith("--resume latest")
    assert code == -signal.SIGKILL
    assert steps_saved(tmp_path / "run") == 4


@pytest.mark.slow
def test_an_error_in_one_process_is_said_once(tmp_path: Path, tiny_config: Path, pictures: Path) -> None:
    """The others would print pages about lost connections, in which the reason is lost."""
    lines, code = train_and_fail("error", 5, tmp_path, tiny_config, pictures)
    assert lines == ["clipgraft: 3.png is broken: remove it"]
    assert code == 2


@pytest.mark.slow
def test_ctrl_c_on_torchrun_saves_once(tmp_path: Path, tiny_config: Path, pictures: Path) -> None:
    """Processes that stop at different steps wait for each other until they are killed, nothing saved."""
    (line,), _ = train_and_fail("stop", 5, tmp_path, tiny_config, pictures)
    step = steps_saved(tmp_path / "run")
    assert step >= 5
    assert line.startswith(f"clipgraft: stopped and saved after step {step} of 1500; go on with: torchrun ")


@pytest.mark.slow
def test_a_process_with_other_settings_ends_the_run(
    tmp_path: Path, tiny_config: Path, pictures: Path
) -> None:
    """Each would step a model of its own, and nobody would see why nothing is learnt."""
    lines, code = train_and_fail("settings", 0, tmp_path, tiny_config, pictures)
    assert lines == [
        "clipgraft: the processes of this run differ from rank 0: rank 1 has lr 3e-05, not auto: "
        "start all of them with the same command, data and base"
    ]
    assert code == 2
    assert not (tmp_path / "run").exists()


def test_processes_that_differ_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """With sixteen machines one must learn which was started with what; a GPU's number may differ."""
    theirs: list[dict[str, object]] = [
        {"data": "a1", "lora": {"r": 4}, "device": "cuda:0"},
        {"data": "a1", "lora": {"r": 4}, "device": "cuda:1"},
        {"data": "b2", "lora": {"r": 4}, "device": "cuda:2"},
        {"data": "a1", "lora": None, "device": "cpu", "teacher": "x"},
    ]

    def gather(_: World, __: str, box: list[object], own: dict[str, str]) -> None:
        box[:] = [{name: str(value) for name, value in values.items() if name in own} for values in theirs]

    monkeypatch.setattr(World, "_call", gather)
    World(1, 4).require_same({"device": "cuda:1"})
    with pytest.raises(cg.errors.ConfigError) as caught:
        World(1, 4).require_same({**theirs[1], "teacher": None})
    assert "rank 2 has data b2, not a1; rank 3 has lora None, not {'r': 4}; teacher x, not nothing" in str(
        caught.value
    )
    assert "rank 1" not in str(caught.value)
