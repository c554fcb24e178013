"""The same server on Ray Serve: its web side as one deployment, and replicas of the model as another.

Requests with an adapter go to a replica that has used it before, where there is one that is not too busy
(Ray Serve calls that model multiplexing), so that the memory for adapters of all replicas adds up.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import pickle
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from clipgraft.cluster import connected, last_line
from clipgraft.errors import ClipgraftError, ConfigError, OverloadedError, UnavailableError
from clipgraft.processes import REQUESTS
from clipgraft.serve.args import WebArgs
from clipgraft.serve.listening import listen
from clipgraft.serve.messages import (
    Backend,
    Describe,
    Description,
    Encode,
    LoadAdapter,
    Message,
    State,
    Statistics,
    Stats,
    Text,
    UnloadAdapter,
)
from clipgraft.serve.worker_process import MakeService

if TYPE_CHECKING:
    from fastapi import FastAPI

log = logging.getLogger("clipgraft.serve")
Answer = TypeVar("Answer")
APP = "clipgraft"
"""Name of the application in Ray Serve."""
_MODEL, _WEB = "Model", "Web"
_ADAPTERS = 256  # adapters of a replica that Ray knows of
_MOST = 1024  # messages of a replica that are under way; its service refuses what would take too long
_TELL = 1.0  # seconds between two reports of a replica, and two looks at whether one answers
_PATIENCE = 10.0  # seconds that a look may take
_INTERRUPTED = 128  # what shells add to the number of the signal that ended a program


def need_ray_serve() -> None:
    """Raise ConfigError where Ray Serve is not installed."""
    try:
        import ray.serve  # noqa: F401
    except ImportError as error:
        raise ConfigError("`engine='ray'` needs Ray Serve: pip install 'clipgraft[ray,serve]'") from error


@dataclass(frozen=True)
class _Failure:
    """An error as a value: on its way through Ray an exception loses its type, and becomes a page."""

    error: Exception


class Board:
    """The actor that knows what the replicas counted, and why one could not be started."""

    def __init__(self) -> None:
        self._told: dict[str, Statistics] = {}
        self._failure: ClipgraftError | None = None

    def tell(self, replica: str, statistics: Statistics) -> None:
        """Take what a replica counted."""
        self._told[replica] = statistics

    def fail(self, error: ClipgraftError) -> None:
        """Take the reason why a replica could not be started."""
        self._failure = error

    def failure(self) -> ClipgraftError | None:
        """Return that reason."""
        return self._failure

    def all(self) -> Statistics:
        """Return what all replicas counted."""
        return added(self._told.values())


def added(told: Iterable[Statistics]) -> Statistics:
    """Add up what several services counted."""
    all_told = list(told)
    stages = {stage for one in all_told for stage in one.seconds}
    return Statistics(
        {name: int(value) for name, value in _sum(one.counts for one in all_told).items()},
        _sum(one.gauges for one in all_told),
        {stage: _sum(one.seconds.get(stage, {}) for one in all_told) for stage in sorted(stages)},
        _sum(one.batch_sizes for one in all_told),
    )


def _sum(mappings: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: Counter[str] = Counter()
    for mapping in mappings:
        for name, value in mapping.items():
            total[name] += value  # type: ignore[assignment]
    return dict(total)


class Replica:
    """A model on the cluster."""

    async def __init__(self, recipe: bytes, board: Any) -> None:  # type: ignore[misc]  # awaited by Ray
        """Build the service of a pickled `MakeService`."""
        from ray import serve

        self._board = board
        try:
            self._service: Backend = await asyncio.to_thread(pickle.loads(recipe))
        except ClipgraftError as error:
            await board.fail.remote(error)
            raise
        self._name = str(serve.get_replica_context().replica_id)
        self._hold = serve.multiplexed(max_num_models_per_replica=_ADAPTERS)(_held)
        self._telling = asyncio.create_task(self._tell())

    async def answer(self, message: Message[Any], timeout: float | None) -> Any:
        """Answer a message; an error is returned as a `_Failure`."""
        from ray import serve

        try:
            found = await self._service.answer(message, timeout=timeout)
        except ClipgraftError as error:
            return _Failure(error)
        if (adapter := serve.get_multiplexed_model_id()) != "":
            await self._hold(adapter)  # after it was used: what is no adapter is not remembered
        return found

    async def check_health(self) -> None:
        """Let Ray replace a replica that computes no more."""
        if self._service.state == "failed":
            raise RuntimeError("the model computes no more")

    async def _tell(self) -> None:
        while True:
            with contextlib.suppress(Exception):
                await self._board.tell.remote(self._name, await self._service.answer(Stats()))
            await asyncio.sleep(_TELL)


async def _held(adapter: str) -> str:
    """Stand for an adapter that the replica has read: the service itself keeps it in memory."""
    return adapter


class RayBackend:
    """A `Backend` over the replicas; start it in the event loop that asks it."""

    def __init__(self, handle: Any, board: Any) -> None:
        self._handle = handle
        self._board = board
        self._state: State = "starting"
        self._looking: asyncio.Task[None] | None = None

    @property
    def state(self) -> State:
        """`ready` while some replica answers."""
        return self._state

    def start(self) -> RayBackend:
        """Begin to look whether replicas answer; gives this backend."""
        self._looking = asyncio.create_task(self._look())
        return self

    async def answer(self, message: Message[Answer], *, timeout: float | None = None) -> Answer:
        """See `Backend.answer`."""
        if self._state == "draining":
            raise UnavailableError("the server is stopping", 5.0)
        if isinstance(message, Stats):
            counted: Answer = await self._board.all.remote()
            return counted
        if isinstance(message, LoadAdapter | UnloadAdapter):
            raise ConfigError("adapters of a server on Ray are fixed: start it with all of them (`adapters`)")
        using = getattr(message, "using", None)
        adapter = None if using is None else using.adapter
        handle = self._handle.options(multiplexed_model_id=adapter) if adapter else self._handle
        response = handle.answer.remote(message, timeout)
        try:
            found = await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except Exception as error:
            raise _translated(error) from error
        if isinstance(found, _Failure):
            raise found.error
        answer: Answer = found
        return answer

    async def close(self) -> None:
        """See `Backend.close`."""
        self._state = "draining"
        if self._looking is not None:
            self._looking.cancel()

    async def _look(self) -> None:
        while True:
            try:
                await asyncio.wait_for(self.answer(Describe()), _PATIENCE)
                self._state = "ready"
            except Exception:
                self._state = "starting" if self._state == "starting" else "restarting"
            await asyncio.sleep(_TELL)


def _translated(error: Exception) -> Exception:
    """Turn an error of Ray's into one of the contract; others, which are faults of ours, stay."""
    import ray
    from ray.serve.exceptions import BackPressureError, RayServeException

    if isinstance(error, BackPressureError):
        return OverloadedError("too much is waiting", 2.0)
    if isinstance(error, ray.exceptions.RayTaskError):
        return RuntimeError(last_line(error))
    if isinstance(error, ray.exceptions.RayError | RayServeException):
        return UnavailableError("the replica was lost over this or another request", 2.0)
    return error


def serve_on_ray(make_service: MakeService, web: WebArgs, told: Callable[[Description], None]) -> int:
    """Serve from a Ray cluster until a signal; gives the exit code. Must run in the main thread.

    Args:
        make_service: builds the service of a replica; pickle must be able to send it.
        web: the server's options; `workers` is the number of replicas.
        told: called with what is served once a real message was answered.

    Raises:
        ConfigError: there is no cluster at the address, or the port is in use.
        ClipgraftError: the model cannot be loaded.
    """
    _check_keys(web)
    if web.ray_address is None:
        listen(web).close()  # a port in use is told before Ray is started
    recipe = pickle.dumps(make_service)
    with connected(web.ray_address) as ray:
        from ray import serve

        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        board = ray.remote(num_cpus=0)(Board).remote()
        where = {"host": web.host, "port": web.port}
        serve.start(proxy_location="HeadOnly", http_options=where, logging_config={"log_level": "ERROR"})
        try:
            described = _deploy(ray, _application(ray, recipe, web, board), board)
            told(described)
            _wait(web)
        finally:
            log.info("stopping")
            serve.delete(APP)  # and no more: on a cluster of others, theirs go on
    return 0


def _check_keys(web: WebArgs) -> None:
    if web.ray_address is not None and web.api_keys is None and os.environ.get("CLIPGRAFT_API_KEYS"):
        raise ConfigError(
            "CLIPGRAFT_API_KEYS does not reach the machines of a cluster: give `api_keys`, a file there"
        )


def _application(ray: Any, recipe: bytes, web: WebArgs, board: Any) -> Any:
    """Bind the two deployments to each other."""
    from ray import serve

    shared = {
        "max_ongoing_requests": _MOST,
        "graceful_shutdown_timeout_s": web.drain_seconds,
        "graceful_shutdown_wait_loop_s": 0.2,
    }
    model = serve.deployment(
        name=_MODEL, num_replicas=web.workers, ray_actor_options=_shares(ray, web.workers), **shared
    )(Replica)

    def build() -> FastAPI:
        from clipgraft.serve.api import create_app

        handle = serve.get_deployment_handle(_MODEL, APP)
        return create_app(lambda: RayBackend(handle, board).start(), web)

    side = serve.deployment(name=_WEB, ray_actor_options={"num_cpus": 0}, **shared)(serve.ingress(build)())
    return side.bind(model.bind(recipe, board))


def _shares(ray: Any, replicas: int) -> dict[str, float]:
    """What of the cluster each replica takes: a GPU, or a part of one, where there are any; else cores."""
    total = ray.cluster_resources()
    if gpus := total.get("GPU", 0.0):
        share = gpus / replicas
        return {"num_gpus": float(int(share)) if share >= 1 else max(0.01, share), "num_cpus": 1.0}
    share = total.get("CPU", 1.0) / replicas
    return {"num_cpus": float(int(share)) if share >= 1 else max(0.01, share)}


def _deploy(ray: Any, application: Any, board: Any) -> Description:
    """Start the replicas, and ask one."""
    from ray import serve

    try:
        serve.run(application, name=APP, route_prefix="/")
        handle = serve.get_deployment_handle(_MODEL, APP)
        described: Description = handle.answer.remote(Describe(), None).result(timeout_s=60)
        if "text" in described.towers:
            handle.answer.remote(Encode((Text("ready"),)), None).result(timeout_s=60)
    except Exception as error:
        failure: ClipgraftError | None = ray.get(board.failure.remote())
        if failure is not None:
            raise failure from error
        raise ClipgraftError(f"`engine='ray'`: the model cannot be started: {last_line(error)}") from error
    return described


def _wait(web: WebArgs) -> None:
    """Wait for a signal; a second one ends the program at once."""
    asked = threading.Event()

    def stop(kind: int, _: FrameType | None) -> None:
        if asked.is_set():
            os._exit(_INTERRUPTED + kind)
        asked.set()

    for kind in REQUESTS:
        signal.signal(kind, stop)
    while not asked.is_set():
        time.sleep(0.2)
