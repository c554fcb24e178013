"""The part that runs on a Ray cluster: workers that decode and encode, and the coordinator of the workers.

The coordinator runs the Ray Data job. Its data set is nothing but numbers of tasks, a few batches each: what
is in a batch comes from the run at home when a worker asks for it, so that neither holds more of the source
than is being worked on, and so that a task can be done again after a worker was lost.

Nothing here imports torch, which the coordinator can do without.
"""

from __future__ import annotations

import logging
import pickle
import threading
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from clipgraft.cluster import last_line
from clipgraft.errors import ClipgraftError, ClusterError
from clipgraft.search.items import Ref, exists

if TYPE_CHECKING:
    from clipgraft.search.engines import EncodedBatch

log = logging.getLogger("clipgraft")
_AHEAD = 64  # batches that wait at the coordinator for the run at home
_RETRIES = 3  # of a task whose worker was lost: some image may be what kills it
_BLOCK_BYTES = 4 << 20  # of vectors that travel together
_WINDOW = 4  # tasks for each worker that may be begun before those ahead of them are at home
_KEPT = "what is finished is kept, and the same command goes on from there"
_PATIENCE = 60.0  # seconds; a task that is done again may be waiting behind those that wait for it


@dataclass(frozen=True)
class Crew:
    """The number of workers, the resources of each, and how batches are divided into tasks."""

    workers: int
    cpus: float
    gpus: float
    batches: int
    per_task: int

    @property
    def tasks(self) -> int:
        return -(-self.batches // self.per_task)

    def span(self, task: int) -> tuple[int, int]:
        """Return the first batch of a task, and the first batch after it."""
        return task * self.per_task, min((task + 1) * self.per_task, self.batches)


@dataclass(frozen=True)
class WorkerBatch:
    """A batch as a worker returns it: on the CPU, with the images that its machine does not have."""

    encoded: EncodedBatch
    unseen: tuple[str, ...]
    machine: str


@dataclass(frozen=True)
class Turn:
    """An answer of the coordinator to the calling process.

    Attributes:
        wanted: how many batches are to be given in all.
        made: what has come since the last turn, each a pickled `WorkerBatch`.
        failure: why nothing more will come.
    """

    wanted: int
    made: Sequence[bytes]
    failure: ClipgraftError | None


class Worker:
    """One process with a model; Ray Data calls it with task numbers."""

    def __init__(self, job: Sequence[Any], crew: Crew, coordinator: Any) -> None:
        """`job` holds the reference of a `ray_engine.Job`."""
        import ray

        def agree(key: str, name: str) -> str:
            return str(ray.get(coordinator.agree.remote(key, name)))

        self._ray = ray
        self._crew = crew
        self._coordinator = coordinator
        self._machine = str(ray.util.get_node_ip_address())
        self._engine = ray.get(job[0]).engine("cuda" if crew.gpus else "cpu", agree)

    def __call__(self, batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield a row for each batch of the tasks: the encoded batch, or the error."""
        for task in batch["item"].tolist():
            try:
                for made in self._made(*self._crew.span(task)):
                    yield _row(made=made)
            # As a value: on its way through Ray an exception loses its cause, and becomes a page.
            except Exception as error:
                log.exception("task %d", task)
                yield _row(failure=_failure(error, f"worker on {self._machine}"))

    def _made(self, first: int, stop: int) -> Iterator[WorkerBatch]:
        keys = self._ray.get(self._coordinator.keys.remote(first, stop))
        for key, encoded in zip(keys, self._engine.encode(keys, stop - first), strict=True):
            vectors = {folder: part.cpu() for folder, part in encoded.vectors.items()}
            unseen = tuple(_unseen(key, encoded.reasons))
            kernels = dict(encoded.kernels)
            yield WorkerBatch(replace(encoded, vectors=vectors, kernels=kernels), unseen, self._machine)


def _unseen(keys: Sequence[Any], reasons: Sequence[str | None]) -> Iterator[str]:
    """Yield the unusable images that do not exist on this machine."""
    for key, reason in zip(keys, reasons, strict=True):
        if reason is not None and isinstance(key, Ref) and exists(key.location) is False:
            yield key.location


class Coordinator:
    """The actor that feeds the workers; the calling process and the workers call its methods concurrently."""

    def __init__(self, job: Sequence[Any], crew: Crew) -> None:
        import ray

        self._changed = threading.Condition()
        self._crew = crew
        self._keys: dict[int, Any] = {}
        self._begun: Counter[tuple[int, int]] = Counter()
        self._fed = 0
        self._wanted = 0
        self._received = 0
        self._dropped = 0
        self._made: deque[bytes] = deque()
        self._kernels: dict[str, str] = {}
        self._failure: ClipgraftError | None = None
        me = ray.get_runtime_context().current_actor
        threading.Thread(target=self._lead, args=(job, me), daemon=True).start()

    def turn(self, keys: Sequence[Any], received: int) -> Turn:
        """Take the next batches' keys; wait until a batch is encoded, or more keys are wanted."""
        with self._changed:
            self._keys.update(enumerate(keys, self._fed))
            self._fed += len(keys)
            self._received = received
            self._forget()
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._made or self._wanted > self._fed or self._failure)
            made = list(self._made)
            self._made.clear()
            self._changed.notify_all()
            return Turn(self._wanted, made, self._failure)

    def keys(self, first: int, stop: int) -> list[Any]:
        """Return the keys of some batches to a worker; a worker far ahead of the others waits."""
        window = _WINDOW * self._crew.workers * self._crew.per_task
        with self._changed:
            self._changed.wait_for(lambda: stop <= self._received + window, _PATIENCE)
            self._wanted = max(self._wanted, stop)
            self._begun[first, stop] += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._fed >= stop)
            return [self._keys[number] for number in range(first, stop)]

    def agree(self, key: str, name: str) -> str:
        """Return the attention kernel that all workers use: the one that was measured first."""
        with self._changed:
            return self._kernels.setdefault(key, name)

    def _forget(self) -> None:
        """Drop the keys of finished tasks; a task that lacks a batch may have to run again."""
        done = self._received // self._crew.per_task * self._crew.per_task
        for number in range(self._dropped, done):
            del self._keys[number]
        for span in [span for span in self._begun if span[1] <= done]:
            del self._begun[span]
        self._dropped = done

    def _lead(self, job: Sequence[Any], me: Any) -> None:
        try:
            for row in _rows(job, self._crew, me):
                if row["failure"]:
                    raise pickle.loads(row["failure"])
                with self._changed:
                    self._changed.wait_for(lambda: len(self._made) < _AHEAD)
                    self._made.append(row["made"])
                    self._changed.notify_all()
            # Told to nobody who has all; but whoever still waits must not do so for ever.
            self._end(ClusterError(f"Ray: the job ended too early; {_KEPT}"))
        except ClipgraftError as error:
            self._end(error)
        # Nobody else would hear of it: the thread ends here.
        except Exception as error:
            log.exception("the Ray Data job")
            self._end(self._killing() or _failure(error, "Ray"))

    def _killing(self) -> ClusterError | None:
        """Return an error if a task was started too often because its workers kept dying."""
        with self._changed:
            (span, times), *_ = [*self._begun.most_common(1), ((0, 0), 0)]
            keys = [part for number in range(*span) for part in self._keys.get(number, ())]
        if times <= _RETRIES or not keys:
            return None
        first, last = (key.location if isinstance(key, Ref) else repr(key) for key in (keys[0], keys[-1]))
        return ClusterError(
            f"Ray: {times} workers in turn were lost over the same items, from {first} to {last}; take out "
            f"what kills them, or give them more memory; {_KEPT}"
        )

    def _end(self, failure: ClipgraftError) -> None:
        with self._changed:
            self._failure = failure
            self._changed.notify_all()


def _rows(job: Sequence[Any], crew: Crew, coordinator: Any) -> Iterator[dict[str, Any]]:
    """Run the Ray Data job: yield a row for each batch, in order."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = _BLOCK_BYTES
    context.execution_options.preserve_order = True
    tasks = ray.data.from_items(list(range(crew.tasks)), override_num_blocks=crew.tasks)
    made = tasks.map_batches(
        Worker,
        fn_constructor_args=(job, crew, coordinator),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=crew.workers, max_tasks_in_flight_per_actor=2),
        num_cpus=crew.cpus,
        num_gpus=crew.gpus,
        max_restarts=-1,
        max_task_retries=_RETRIES,
    )
    yield from made.iter_rows()


def _row(*, made: WorkerBatch | None = None, failure: ClipgraftError | None = None) -> dict[str, Any]:
    """Make one row for Ray Data; a value of None becomes empty bytes."""
    cells = {"made": made, "failure": failure}
    packed = {name: b"" if cell is None else pickle.dumps(cell) for name, cell in cells.items()}
    return {name: np.array([cell], dtype=object) for name, cell in packed.items()}


def _failure(error: Exception, where: str) -> ClipgraftError:
    """Turn an exception into a `ClipgraftError` with a message of one line."""
    if isinstance(error, ClipgraftError):
        return type(error)(f"{where}: {error}")
    return ClusterError(f"{where}: {last_line(error)}; {_KEPT}")
