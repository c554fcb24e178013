"""Decode and encode batches on a Ray cluster, or on this machine by Ray's processes.

Listing, comparing, batching and writing stay in the calling process, and so does the order: the files that it
writes are those of a `LocalEngine` on machines of one kind.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from clipgraft.cluster import connected, last_line
from clipgraft.engine.attention import AttentionKernels
from clipgraft.engine.encoder import Encoder
from clipgraft.errors import ClusterError, ConfigError, DataError, ModelError
from clipgraft.models.clip import Clip
from clipgraft.search.args import EncodeArgs
from clipgraft.search.engines import EncodedBatch, LocalEngine, Modality
from clipgraft.search.items import exists
from clipgraft.search.manifest import Dtype, VectorSet
from clipgraft.search.ray_worker import Coordinator, Crew, Turn, WorkerBatch

log = logging.getLogger("clipgraft")
_MOST_TASKS = 4096
_MOST_PER_TASK = 8  # batches, as long as that makes no more than _MOST_TASKS


def need_ray() -> None:
    """Raise ConfigError where Ray, or what Ray Data needs, is not installed."""
    try:
        import ray.data  # noqa: F401
    except ImportError as error:
        raise ConfigError("`engine='ray'` needs Ray: pip install 'clipgraft[ray]'") from error


@dataclass(frozen=True)
class Job:
    """Everything a worker needs; the model is on the CPU. `threads` are those of the calling process."""

    clip: Clip
    modality: Modality
    sets: tuple[VectorSet, ...]
    switch: bool
    dtype: Dtype
    autocast: bool
    int8: bool
    kernels: Mapping[str, str]
    threads: int

    def engine(self, device: str, agree: Callable[[str, str], str]) -> LocalEngine:
        """Make the engine that encodes in this process."""
        torch.set_num_threads(self.threads)  # sums may round otherwise with another number
        attention = AttentionKernels(agree)
        attention.choices.update(self.kernels)
        encoder = Encoder(self.clip.to(device), self.autocast, attention, int8=self.int8)
        return LocalEngine(encoder, self.modality, self.sets, self.switch, self.dtype)


@dataclass(frozen=True)
class RayEngine:
    """Processes on a Ray cluster, each with the model of `local`."""

    local: LocalEngine
    args: EncodeArgs

    def encode(self, keys: Iterable[Any], count: int) -> Generator[EncodedBatch, None, None]:
        """Encode as `LocalEngine.encode` does. With no batch, nothing is started.

        Raises:
            ConfigError: there is no cluster at the address, or it has no GPU.
            ModelError: the model cannot be sent.
            DataError: an image that is here is not there for a worker.
            ClusterError: workers failed, one of them again and again over the same images.
        """
        if count:
            with connected(self.args.ray_address) as ray:
                yield from self._encode(ray, iter(keys), count)

    def _encode(self, ray: Any, keys: Iterator[Any], count: int) -> Generator[EncodedBatch, None, None]:
        threads = torch.get_num_threads()
        crew = _crew(ray, self.args, self.local.encoder.clip.device.type, threads, count)
        log.info("ray: %d workers, each with %g CPUs and %g GPUs", crew.workers, crew.cpus, crew.gpus)
        job = _sent(ray, self.local, threads)
        # Beside the process that feeds it, and with a thread for each worker that may be waiting.
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        options = {"num_cpus": 0, "max_concurrency": 2 * crew.workers + 8, "scheduling_strategy": here}
        coordinator = ray.remote(**options)(Coordinator).remote([job], crew)
        try:
            for made in _turns(ray, coordinator, keys, count):
                _check_seen(made)
                yield made.encoded
        except ray.exceptions.RayError as error:
            raise ClusterError(
                f"`engine='ray'`: {last_line(error)}; what is finished is kept, and the same call goes on"
            ) from error
        finally:
            ray.kill(coordinator)


def _turns(ray: Any, coordinator: Any, keys: Iterator[Any], count: int) -> Iterator[WorkerBatch]:
    """Exchange keys for encoded batches with the coordinator until all batches are there."""
    fed, received, given = 0, 0, list[Any]()
    while received < count:
        turn: Turn = ray.get(coordinator.turn.remote(given, received))
        yield from map(pickle.loads, turn.made)
        received += len(turn.made)
        if turn.failure is not None and received < count:
            raise turn.failure
        given = list(islice(keys, turn.wanted - fed))
        fed += len(given)


def _check_seen(made: WorkerBatch) -> None:
    """Raise DataError for an image that exists here, but not on its worker's machine."""
    for location in made.unseen:
        if exists(location):
            raise DataError(
                f"{location}: is not there for the worker on {made.machine}; with `engine='ray'` every "
                "machine must see the images under the same paths: share the folder, or give an address "
                "such as s3://…"
            )


def _crew(ray: Any, args: EncodeArgs, device: str, threads: int, batches: int) -> Crew:
    """Plan the use of the cluster. A worker computes with as many threads as this process would."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = float(device == "cuda") if args.ray_gpus_per_worker is None else args.ray_gpus_per_worker
    if gpus:
        cpus, room = 1.0, sum(int(node.get("GPU", 0) / gpus) for node in nodes)
        if not room:
            raise ConfigError(
                f"`ray_gpus_per_worker={gpus:g}`: no machine of the cluster has that many; "
                "add one, or give 0 to encode on CPUs"
            )
    else:
        cpus = min(float(threads), max((node.get("CPU", 0.0) for node in nodes), default=1.0) or 1.0)
        room = sum(int(node.get("CPU", 0) / cpus) for node in nodes)
        if args.ray_workers is not None and args.ray_workers > room and len(nodes) == 1:
            # More than one machine has room for: they share its cores.
            cpus = max(0.01, nodes[0].get("CPU", 0.0) / args.ray_workers)
            cpus = float(int(cpus)) if cpus > 1 else cpus
    workers = args.ray_workers or max(1, room)
    shares = -(-batches // (4 * workers))
    per_task = max(-(-batches // _MOST_TASKS), min(_MOST_PER_TASK, shares))
    return Crew(min(workers, -(-batches // per_task)), cpus, gpus, batches, per_task)


def _sent(ray: Any, local: LocalEngine, threads: int) -> Any:
    """Put the model and its settings into the cluster's object store."""
    encoder = local.encoder
    kernels = dict(encoder.attention.choices)
    with _on_cpu(encoder.clip):
        job = Job(
            encoder.clip,
            local.modality,
            local.sets,
            local.switch,
            local.dtype,
            encoder.autocast,
            encoder.int8,
            kernels,
            threads,
        )
        try:
            return ray.put(job)
        # Pickle raises what it likes, and so do the classes that it meets.
        except Exception as error:
            raise ModelError(
                f"the model cannot be sent to workers ({last_line(error)}); load it by clipgraft.load, "
                "and detach hooks that hold files, locks or the like"
            ) from error


@contextmanager
def _on_cpu(clip: Clip) -> Iterator[None]:
    """Move the model to the CPU meanwhile: a machine without a GPU cannot read weights on one."""
    device = clip.device
    if device.type == "cpu":
        yield
        return
    clip.to("cpu")
    try:
        yield
    finally:
        clip.to(device)
