"""The processes of one run, and what they tell each other: rows, gradients, values, and when to stop.

A process is to a step what a micro-batch is to accumulation (`train.gradient_cache`): it computes features of
its part of the batch, and carries their gradients on to the weights. The loss is computed where all features
meet, at rank 0, so that random negatives are drawn once and weights that act on the loss alone, such as the
temperature, get their gradient once. The sum over processes is then the gradient of the whole batch.

Nothing here does any work for a process that is alone: `ALONE`, which is what all functions take by default.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from clipgraft.errors import ConfigError
from clipgraft.shown import shown_line
from clipgraft.train.heartbeat import Heartbeat

_Value = TypeVar("_Value")
_Item = TypeVar("_Item", str, Path, int)
OWN = frozenset({"device", "workers", "feature_cache", "cache_gb", "progress"})


@dataclass(frozen=True)
class World:
    """The processes of a run as one of them sees it; all of them call every method, in the same order.

    Attributes:
        rank: number of this process, from 0.
        world_size: how many there are.
        local_rank: number of this process on its machine, and of its GPU.
        heartbeat: knows why another process is silent; None for one that is alone.

    All methods raise ProcessLostError where another process is gone.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    heartbeat: Heartbeat | None = None

    @property
    def alone(self) -> bool:
        return self.world_size == 1

    @property
    def is_rank0(self) -> bool:
        """Whether this is the process that computes the loss, and the only one that writes and prints."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This process's part of `count` items; in the order of ranks the parts are all items in order."""
        each, more = divmod(count, self.world_size)
        start = self.rank * each + min(self.rank, more)
        return slice(start, start + each + (self.rank < more))

    def gather(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        """The tensors, (n, *item) each, that every process gives, by rank.

        Numbers of rows may differ between processes; items and types may not. No gradient flows.
        """
        if self.alone:
            return [tensors]
        counts = torch.tensor([len(tensor) for tensor in tensors])
        rows = [found.tolist() for found in self._all_gather(counts)]
        of_row = [tensor.element_size() * math.prod(tensor.shape[1:]) for tensor in tensors]
        sizes = [[n * size for n, size in zip(own, of_row, strict=True)] for own in rows]
        flat = torch.cat([tensor.detach().reshape(-1).view(torch.uint8) for tensor in tensors])
        padded = torch.cat([flat, flat.new_zeros(max(map(sum, sizes)) - len(flat))])
        return [
            tuple(
                # A copy, because a wider type cannot begin at any byte.
                piece.clone().view(tensor.dtype).view(n, *tensor.shape[1:])
                for piece, n, tensor in zip(
                    torch.split(found[: sum(own)], own), counted, tensors, strict=True
                )
            )
            for found, own, counted in zip(self._all_gather(padded), sizes, rows, strict=True)
        ]

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by the sum over all processes, in one flat bucket of at least fp32.

        A weight that got its gradient elsewhere has it here as well; one that got none anywhere still has
        none.
        """
        if self.alone:
            return
        present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
        self._sum(present)
        found = [p for p, count in zip(parameters, present.tolist(), strict=True) if count]
        for p in found:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        gradients = [p.grad for p in found if p.grad is not None]
        for bucket in _by_type(gradients, lambda g: torch.promote_types(g.dtype, torch.float32)):
            wide = torch.promote_types(bucket[0].dtype, torch.float32)
            flat = torch.cat([gradient.reshape(-1).to(wide) for gradient in bucket])
            self._sum(flat)
            _fill(bucket, flat)

    def send(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with those of rank 0, in one flat bucket for each type."""
        if self.alone:
            return
        for bucket in _by_type(tensors, lambda tensor: tensor.dtype):
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in bucket])
            self._call("broadcast", flat.view(torch.uint8), 0)
            _fill(bucket, flat)

    def on_rank0(self, make: Callable[[], _Value]) -> _Value:
        """What `make` gives at rank 0, where alone it is called; others get a copy of the value."""
        if self.alone:
            return make()
        box: list[Any] = [make() if self.is_rank0 else None]
        self._call("broadcast_object_list", box, 0, device=torch.device("cpu"))
        value: _Value = box[0]
        return value

    def require_same(self, values: Mapping[str, object]) -> None:
        """Refuse to go on where a process has another value than rank 0, in all of them.

        What belongs to a machine (`OWN`) may differ.

        Raises:
            ConfigError: naming the ranks and the values.
        """
        if self.alone:
            return
        here = {name: str(value)[:1000] for name, value in values.items() if name not in OWN}
        given: list[Any] = [None] * self.world_size
        self._call("all_gather_object", given, here)
        told = []
        for rank, other in enumerate(given):
            names = [name for name in {**given[0], **other} if other.get(name) != given[0].get(name)]
            if names:
                shown = [f"{n} {_brief(other.get(n))}, not {_brief(given[0].get(n))}" for n in names]
                more = f" and {len(shown) - 4} more" if len(shown) > 4 else ""
                told.append(f"rank {rank} has {'; '.join(shown[:4])}{more}")
        if told:
            raise ConfigError(
                f"the processes of this run differ from rank 0: {'; '.join(told[:4])}: start all of them "
                "with the same command, data and base"
            )

    def any(self, here: bool) -> bool:
        """Whether it is so in one process at least."""
        if self.alone:
            return here
        count = torch.tensor([int(here)])
        self._sum(count)
        return bool(count.item())

    def barrier(self) -> None:
        """Return when all processes have come here."""
        self.any(False)

    def reseed(self, seed: int, step: int) -> None:
        """Give this process a random stream of its own for a step; rank 0 keeps the run's.

        The stream depends on (seed, rank, step) alone, so that a checkpoint need not hold those of all.
        """
        if not self.is_rank0:
            words = np.random.SeedSequence([seed, self.rank, step]).generate_state(1, np.uint64)
            torch.manual_seed(int(words[0]))

    def advise(self, advice: str) -> None:
        """What to tell the user to do where a process is lost."""
        if self.heartbeat is not None:
            self.heartbeat.advice = advice

    def _all_gather(self, tensor: Tensor) -> list[Tensor]:
        found = [torch.empty_like(tensor) for _ in range(self.world_size)]
        self._call("all_gather", found, tensor)
        return found

    def _sum(self, tensor: Tensor) -> None:
        self._call("all_reduce", tensor)

    def _call(self, collective: str, *arguments: Any, **options: Any) -> None:
        import torch.distributed as dist

        assert self.heartbeat is not None
        try:
            getattr(dist, collective)(*arguments, **options)
        except RuntimeError as error:
            raise self.heartbeat.explain(error) from error


ALONE = World()


def in_shares(world: World, items: Sequence[_Item], encode: Callable[[Sequence[_Item]], Tensor]) -> Tensor:
    """(N, *item) rows of all items in order, of which each process encodes its share.

    `encode` maps a sequence of n items, at least one, to (n, *item) rows.
    """
    if world.alone:
        return encode(items)
    own = items[world.share(len(items))]
    rows = encode(own or items[:1])[: len(own)]
    return torch.cat([given for (given,) in world.gather(rows)])


def _brief(value: str | None) -> str:
    """A setting in a message."""
    return "nothing" if value is None else shown_line(value, 60)


def _by_type(tensors: Iterable[Tensor], type_of: Callable[[Tensor], torch.dtype]) -> Iterable[list[Tensor]]:
    """Tensors that go into one bucket, in an order that is the same in every process."""
    buckets: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        buckets.setdefault(type_of(tensor), []).append(tensor)
    return buckets.values()


def _fill(tensors: Sequence[Tensor], flat: Tensor) -> None:
    with torch.no_grad():
        for tensor, piece in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
            tensor.copy_(piece.view_as(tensor))
