"""`encode_folder(engine="ray")`: the same bytes as here, whatever happens to workers and to the run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

import clipgraft as cg
from clipgraft.cli import main
from clipgraft.models.clip import Clip
from clipgraft.models.load import load
from clipgraft.search import ray_engine
from clipgraft.search.args import EncodeArgs
from clipgraft.search.encode import _batches, _how_many, encode_folder
from clipgraft.search.items import Item
from clipgraft.search.plan import Plan
from clipgraft.search.ray_worker import _WINDOW, Crew
from encoded_folders import BAD, GOOD, MakeAdapter, read_errors, tree_bytes, write_picture

SMALL = {"batch_size": 4, "shard_rows": 6, "workers": 0, "autocast": False}
RAY = {**SMALL, "engine": "ray", "ray_workers": 2}
ALONE = {**RAY, "ray_workers": 1}
# Ray leaves log files open, and processes running when it is shut down, in its earlier releases.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:Exception ignored in. <(_io.FileIO|function Popen):pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small Ray of this module's own on two cores; gives the cache folder that its workers use."""
    ray = pytest.importorskip("ray")
    cache = tmp_path_factory.mktemp("ray-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIPGRAFT_CACHE", str(cache))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            address="local",
            num_cpus=2,
            object_store_memory=80 << 20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
    yield cache
    ray.shutdown()


@pytest.fixture
def same_kernels(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What this process measures of attention kernels is what the workers know, as on one machine."""
    monkeypatch.setenv("CLIPGRAFT_CACHE", str(cluster))


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def killed_at(done: int) -> Callable[[int, int], None]:
    def progress(now: int, total: int) -> None:
        if now >= done:
            raise Killed

    return progress


@pytest.mark.slow
@pytest.mark.usefixtures("same_kernels")
def test_the_same_bytes_as_the_local_engine(clip: Clip, pictures: Path, tmp_path: Path) -> None:
    """A folder could not be continued on one machine that was begun on many, and results would differ."""
    encode_folder(clip, pictures, tmp_path / "local", **SMALL)
    result = encode_folder(clip, pictures, tmp_path / "ray", **RAY)
    assert (result.encoded, result.rows, result.errors) == (GOOD + 2, GOOD, 2)
    assert set(read_errors(tmp_path / "ray")) == BAD
    assert tree_bytes(tmp_path / "ray") == tree_bytes(tmp_path / "local")


@pytest.mark.slow
@pytest.mark.usefixtures("same_kernels")
def test_adapters_in_memory(clip: Clip, pictures: Path, tmp_path: Path, make_adapter: MakeAdapter) -> None:
    """Workers would encode with the base, as a name is all that they could load."""
    for name, targets in (("vi", "text.*.*"), ("eye", "vision.*.q,v")):
        cg.load_adapter(clip, make_adapter(name, targets), name=name, activate=False)
    for folder, words in (("local", SMALL), ("ray", RAY)):
        encode_folder(clip, pictures, tmp_path / folder, adapters=["vi", "eye"], **words)
    assert tree_bytes(tmp_path / "ray") == tree_bytes(tmp_path / "local")
    assert (tmp_path / "ray/eye/img_emb").is_dir()


@pytest.mark.slow
@pytest.mark.usefixtures("same_kernels")
def test_texts_and_how_far_ahead_they_are_taken(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter that was never saved would not act there; and memory would grow with the number of items."""
    made = load(str(tiny_config), "none")
    cg.apply_lora(made, r=2, targets="text.*.*")
    for name, parameter in made.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    (tmp_path / "words.txt").write_text("".join(f"{'a dog ' * (n % 30)}{n}\n" for n in range(600)))
    taken, ahead, real = 0, list[int](), Plan.to_do

    def counted(plan: Plan) -> Iterator[Item]:
        nonlocal taken
        for item in real(plan):
            taken += 1
            yield item

    monkeypatch.setattr(Plan, "to_do", counted)
    sizes = {"texts": True, "shard_rows": 300, "batch_size": 3}
    encode_folder(made, tmp_path / "words.txt", tmp_path / "local", **{**SMALL, **sizes})
    taken = 0
    encode_folder(
        made,
        tmp_path / "words.txt",
        tmp_path / "ray",
        progress=lambda done, _: ahead.append(taken - done),
        **{**RAY, **sizes},
    )
    assert tree_bytes(tmp_path / "ray") == tree_bytes(tmp_path / "local")
    tasks = _WINDOW * 2 + 2  # those begun, and for each worker one that is being handed out
    assert max(ahead) <= tasks * 8 * 3 + 1 < taken


@pytest.mark.slow
@pytest.mark.usefixtures("same_kernels")
def test_kill_rerun_and_difference(clip: Clip, pictures: Path, tmp_path: Path) -> None:
    """A run that was cut off would begin anew, lose a shard, or keep workers of a dead run busy."""
    with pytest.raises(Killed):
        encode_folder(clip, pictures, tmp_path / "ray", progress=killed_at(14), **RAY)
    rest = encode_folder(clip, pictures, tmp_path / "ray", **RAY)
    assert rest.encoded == GOOD + 2 - 12
    encode_folder(clip, pictures, tmp_path / "local", **SMALL)
    assert tree_bytes(tmp_path / "ray") == tree_bytes(tmp_path / "local")
    (pictures / "00.png").unlink()
    write_picture(pictures / "a/broken.jpg", 50)
    write_picture(pictures / "new.png", 51)
    result = encode_folder(clip, pictures, tmp_path / "ray", **RAY)
    assert (result.encoded, result.removed, result.kept) == (2, 1, GOOD - 1)
    encode_folder(clip, pictures, tmp_path / "local", **SMALL)
    assert tree_bytes(tmp_path / "ray") == tree_bytes(tmp_path / "local")


def test_nothing_to_do_starts_nothing(
    clip: Clip, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A nightly rerun without a new picture would wait for a cluster."""
    pytest.importorskip("ray")
    encode_folder(clip, pictures, tmp_path / "out", **SMALL)

    def never(*_: object) -> None:
        raise AssertionError("connected")

    monkeypatch.setattr(ray_engine, "connected", never)
    assert encode_folder(clip, pictures, tmp_path / "out", **RAY).encoded == 0


@pytest.mark.slow
@pytest.mark.usefixtures("same_kernels")
def test_a_worker_that_dies_once(clip: Clip, pictures: Path, tmp_path: Path) -> None:
    """One machine that is taken away would end a run of days, or leave a gap in it."""
    plain, mark = clip.require_preprocess(), str(tmp_path / "died")

    def deadly(image: Image.Image) -> Tensor:
        if image.size == (36 + 13 % 7, 40 + 13 % 5):
            try:
                os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return plain(image)
            os._exit(1)
        return plain(image)

    clip.preprocess = deadly
    encode_folder(clip, pictures, tmp_path / "ray", exact_preprocess=True, **RAY)
    assert Path(mark).exists()
    encode_folder(clip, pictures, tmp_path / "local", exact_preprocess=True, **SMALL)
    assert tree_bytes(tmp_path / "ray") == tree_bytes(tmp_path / "local")


@pytest.mark.slow
@pytest.mark.usefixtures("same_kernels")
def test_a_worker_that_always_dies(clip: Clip, pictures: Path, tmp_path: Path) -> None:
    """An image that kills its decoder would keep a cluster busy for ever."""
    plain = clip.require_preprocess()

    def deadly(image: Image.Image) -> Tensor:
        if image.size == (36 + 20 % 7, 40 + 20 % 5):
            os._exit(1)
        return plain(image)

    clip.preprocess = deadly
    with pytest.raises(cg.errors.ClusterError, match="4 workers in turn were lost") as failed:
        encode_folder(clip, pictures, tmp_path / "out", exact_preprocess=True, **ALONE)
    named = re.search(r"from (\S+) to (\S+);", str(failed.value))
    assert named is not None
    assert named[1] <= str(pictures / "b/c/20.png") <= named[2]
    assert "\n" not in str(failed.value)


@pytest.mark.slow
@pytest.mark.usefixtures("same_kernels")
def test_a_fault_in_a_worker(clip: Clip, pictures: Path, tmp_path: Path) -> None:
    """What went wrong would be buried in pages of another process's traceback."""

    def wrong(image: Image.Image) -> Tensor:
        raise RuntimeError("no memory\nis left")

    clip.preprocess = wrong
    with pytest.raises(
        cg.errors.ClusterError, match=r"worker on [\d.]+: RuntimeError: is left; what is finished"
    ):
        encode_folder(clip, pictures, tmp_path / "out", exact_preprocess=True, **ALONE)


@pytest.mark.slow
@pytest.mark.usefixtures("same_kernels")
def test_images_that_workers_cannot_see(clip: Clip, pictures: Path, tmp_path: Path) -> None:
    """A folder of this machine alone would end as a list of a million unreadable images."""
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe_file("/only-here/x.png", (pictures / "00.png").read_bytes())
    with pytest.raises(
        cg.errors.DataError, match=r"only-here/x.png: is not there for the worker on .*same paths"
    ):
        encode_folder(clip, "memory://only-here", tmp_path / "out", **ALONE)


@pytest.mark.slow
def test_the_command_line_starts_and_ends_ray(clip: Clip, pictures: Path, tmp_path: Path) -> None:
    """`--engine ray` on a laptop would need a cluster first, or leave one running behind it."""
    pytest.importorskip("ray")
    words = [str(pictures), "--model", clip.source.name, "--pretrained", "none", "--precision", "fp32"]
    words += ["--batch-size", "4", "--shard-rows", "6", "--workers", "1", "--device", "cpu"]
    assert main(["encode", *words[:1], str(tmp_path / "local"), *words[1:]]) == 0
    program = "import sys, ray\nfrom clipgraft.cli import main\n"
    program += "code = main(sys.argv[1:])\nassert not ray.is_initialized()\nsys.exit(code)"
    ray = ["--engine", "ray", "--ray-address", "local", "--ray-workers", "1"]
    done = subprocess.run(
        [sys.executable, "-c", program, "encode", *words[:1], str(tmp_path / "ray"), *words[1:], *ray],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "ray: 1 workers" in done.stdout
    assert tree_bytes(tmp_path / "ray") == tree_bytes(tmp_path / "local")


def test_without_ray(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A missing package would be told as a traceback, after the model was loaded."""
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.data", None)
    words = ["encode", str(pictures), str(tmp_path / "out"), "--engine", "ray", "--model", "no such model"]
    assert main(words) == 2
    assert "pip install 'clipgraft[ray]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_ray_flags_without_ray(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that was meant for a cluster would take a day on the laptop."""
    assert main(["encode", str(pictures), str(tmp_path / "out"), "--ray-workers", "8"]) == 2
    assert "--ray-workers: goes with --engine ray" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"engine": "spark"}, "engine: got 'spark', allowed is one of 'local' or 'ray'"),
        ({"engine": "ray", "ray_workers": 0}, "ray_workers: got 0"),
        ({"engine": "ray", "ray_gpus_per_worker": -1}, "ray_gpus_per_worker: got -1"),
    ],
)
def test_wrong_arguments(clip: Clip, pictures: Path, words: dict[str, Any], says: str) -> None:
    """A typing error would run something else, or end in Ray's own words."""
    pytest.importorskip("ray")
    with pytest.raises(cg.errors.ConfigError, match=says):
        encode_folder(clip, pictures, pictures.parent / "out", **words)


def test_no_cluster_at_the_address(
    clip: Clip, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong port would end in a page of a network library's."""
    ray = pytest.importorskip("ray")
    asked: list[str] = []

    def unreachable(address: str, **_: Any) -> None:
        asked.append(address)
        raise ConnectionError("a page\nof no use\n  connection timed out\n")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", unreachable)
    monkeypatch.setenv("RAY_ADDRESS", "ray://there:1")
    for address, expected in ((None, "ray://there:1"), ("auto", "auto")):
        with pytest.raises(
            cg.errors.ConfigError, match=r"cannot be reached .*: connection timed out.*ray start"
        ) as no:
            encode_folder(clip, pictures, tmp_path / "out", **RAY, ray_address=address)
        assert "\n" not in str(no.value)
        assert asked[-1] == expected


@pytest.mark.parametrize(
    ("nodes", "threads", "asked", "workers", "cpus", "gpus"),
    [
        ([{"CPU": 2}], 2, {}, 1, 2, 0),
        ([{"CPU": 2}], 1, {}, 2, 1, 0),
        ([{"CPU": 2}], 2, {"ray_workers": 2}, 2, 1, 0),
        ([{"CPU": 2}], 1, {"ray_workers": 8}, 8, 0.25, 0),
        ([{}, {"CPU": 16}, {"CPU": 20}], 8, {}, 4, 8, 0),
        ([{"CPU": 4}, {"CPU": 4}], 8, {}, 2, 4, 0),
        ([{"CPU": 8}], 4, {"ray_workers": 2, "ray_gpus_per_worker": 0}, 2, 4, 0),
        ([{"CPU": 8, "GPU": 2}, {"CPU": 8}], 4, {"ray_gpus_per_worker": 0.5}, 4, 1, 0.5),
        ([{"CPU": 8, "GPU": 2}], 4, {"ray_gpus_per_worker": 1, "ray_workers": 1}, 1, 1, 1),
    ],
)
def test_how_much_of_a_cluster_is_taken(
    nodes: list[dict[str, float]], threads: int, asked: dict[str, Any], workers: int, cpus: float, gpus: float
) -> None:
    """Workers would wait for ever for cores that are not there, or crowd each other."""
    pytest.importorskip("ray")
    ray = SimpleNamespace(nodes=lambda: [{"Alive": True, "Resources": node} for node in nodes])
    crew = ray_engine._crew(ray, EncodeArgs(**asked), "cpu", threads, 1000)
    assert (crew.workers, crew.cpus, crew.gpus) == (workers, cpus, gpus)


def test_a_cluster_without_gpus() -> None:
    """The run would wait silently for a machine that nobody is going to add."""
    pytest.importorskip("ray")
    ray = SimpleNamespace(nodes=lambda: [{"Alive": True, "Resources": {"CPU": 8}}])
    with pytest.raises(cg.errors.ConfigError, match="no machine of the cluster has that many"):
        ray_engine._crew(ray, EncodeArgs(), "cuda", 1, 10)


@given(st.integers(1, 10**8), st.integers(1, 300))
def test_every_batch_is_in_one_task(batches: int, workers: int) -> None:
    """Batches would be lost or done twice; or a large job make more tasks than Ray can keep."""
    shares = SimpleNamespace(ray_workers=workers, ray_gpus_per_worker=0.0)
    ray = SimpleNamespace(nodes=lambda: [{"Alive": True, "Resources": {"CPU": workers}}])
    crew: Crew = ray_engine._crew(ray, shares, "cpu", 1, batches)  # type: ignore[arg-type]
    assert 1 <= crew.tasks <= 4096
    assert crew.workers <= crew.tasks
    first, last = crew.span(0), crew.span(crew.tasks - 1)
    assert (first[0], last[1]) == (0, batches)
    assert last[0] < last[1]
    assert all(crew.span(task)[1] == crew.span(task + 1)[0] for task in range(min(crew.tasks - 1, 50)))


@given(st.integers(0, 200), st.integers(1, 20), st.integers(1, 30))
def test_batches_are_counted_before_they_are_made(items: int, batch: int, shard: int) -> None:
    """The last batches would never be asked for, or waited for for ever."""
    sizes = EncodeArgs(batch_size=batch, shard_rows=shard)
    assert _how_many(items, sizes) == len(list(_batches((Item(str(n)) for n in range(items)), sizes)))
