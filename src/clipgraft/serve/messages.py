"""What is asked of a model that is served, and what it answers: plain values that cross processes.

The web side (`clipgraft.serve.api`) knows only these and a `Backend`; it imports no torch. Three backends
answer them: `clipgraft.serve.service.Service` in this process, `clipgraft.serve.worker.Worker` in a process
of its own, and replicas of Ray Serve (`clipgraft.serve.ray_app`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

Answer = TypeVar("Answer")
Vectors: TypeAlias = npt.NDArray[np.float32]
State: TypeAlias = Literal["starting", "ready", "restarting", "draining", "failed"]


@dataclass(frozen=True)
class Text:
    """A text to encode."""

    text: str


@dataclass(frozen=True)
class Picture:
    """An image to encode: the bytes of a file of any format that `clipgraft.pictures` opens."""

    content: bytes = field(repr=False)


Item: TypeAlias = Text | Picture


class Message(Generic[Answer]):
    """One question; its type parameter is the type of the answer."""


@dataclass(frozen=True)
class With:
    """Which weights answer.

    Attributes:
        adapter: the name of a registered adapter; None is the base.
        strength: what the adapter's update is multiplied by; 0 is the base, 1 as it was trained.
    """

    adapter: str | None = None
    strength: float = 1.0


BASE = With()


@dataclass(frozen=True)
class Encode(Message["Encoded"]):
    """Encode texts and images, in any mixture.

    Raises (where it is answered):
        UnknownNameError: no such adapter.
        ItemError: an item cannot be used; it names the first.
    """

    items: tuple[Item, ...]
    using: With = BASE


@dataclass(frozen=True)
class Encoded:
    """Features of items.

    Attributes:
        vectors: (N, D) fp32, unit norm, in the order of the items.
        tokens: how many tokens each item was read as: of a text before it was cut, of an image its patches.
        cut: the numbers of the texts that were longer than the model's context, whose end was not read.
    """

    vectors: Vectors
    tokens: tuple[int, ...]
    cut: tuple[int, ...] = ()


@dataclass(frozen=True)
class Classify(Message["Classified"]):
    """Give items probabilities over classes.

    Attributes:
        items: texts or images.
        classes: their names; empty for those of the adapter's trained head.
        templates: prompts with `{}` for the class; their unit features are averaged.
        template_weights: how much each template counts in that mean, 0 or more; empty for all alike.
        using: the adapter.
        head: use the head that was trained with the adapter; None does where there is one and no classes
            are given.
    """

    items: tuple[Item, ...]
    classes: tuple[str, ...] = ()
    templates: tuple[str, ...] = ("{}",)
    using: With = BASE
    head: bool | None = None
    template_weights: tuple[float, ...] = ()


def weights_fault(weights: Sequence[float], templates: Sequence[str]) -> str:
    """What is wrong with the weights of templates, or ""; no weights are all alike."""
    if weights and len(weights) != len(templates):
        told = f"got {len(weights)} for {len(templates)} templates; give one for each, or none"
    elif weights and not (min(weights) >= 0 and 0 < sum(weights) < math.inf):
        told = "each must be 0 or more and finite, and one above 0"
    else:
        return ""
    return f"`template_weights`: {told}"


@dataclass(frozen=True)
class Classified:
    """Probabilities over classes.

    Attributes:
        classes: names, in the order of the columns.
        probabilities: (N, C) fp32: a softmax of logits, or sigmoids of a model that has a `logit_bias`.
        scores: (N, C) fp32 cosines, or logits of a head.
        kind: `softmax` or `sigmoid`.
    """

    classes: tuple[str, ...]
    probabilities: Vectors
    scores: Vectors
    kind: Literal["softmax", "sigmoid"] = "softmax"


@dataclass(frozen=True)
class Rank(Message["Ranked"]):
    """Sort documents, texts or images, by their cosine to a query, a text or an image."""

    query: Item
    documents: tuple[Item, ...]
    using: With = BASE
    top: int | None = None


@dataclass(frozen=True)
class Ranked:
    """Documents by cosine, best first: their numbers, and their cosines; `tokens` of query and documents."""

    order: tuple[int, ...]
    scores: tuple[float, ...]
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class Search(Message["Found"]):
    """Find rows of an encoded folder by a text, an image, or both.

    Attributes:
        folder: the name that the folder is served under; empty for the only one.
        text, picture: what to look for, one or both.
        picture_weight: of the image where both are given (`clipgraft.search.query`).
        k: most results.
        where: conditions on metadata (`clipgraft.search.filters`).
        using: the adapter; one of the text tower alone searches the base's image vectors.
    """

    folder: str = ""
    text: str | None = None
    picture: Picture | None = None
    picture_weight: float = 0.5
    k: int = 10
    where: str | None = None
    using: With = BASE


@dataclass(frozen=True)
class Found:
    """Results of a search, best first, as flat rows: rank, score, row, path, caption, metadata."""

    hits: tuple[Mapping[str, Any], ...]
    folder: str


@dataclass(frozen=True)
class Thumbnail(Message[bytes]):
    """The image of a row of an encoded folder as a small JPEG, `side` pixels at most."""

    folder: str
    row: int
    side: int = 320


@dataclass(frozen=True)
class LoadAdapter(Message["AdapterInfo"]):
    """Register an adapter under a name and load it; one of that name is replaced if it is `replace`."""

    name: str
    source: str
    replace: bool = False


@dataclass(frozen=True)
class UnloadAdapter(Message[None]):
    """Forget a registered adapter; requests that are under way end with it."""

    name: str


@dataclass(frozen=True)
class Describe(Message["Description"]):
    """Say what is served."""


@dataclass(frozen=True)
class AdapterInfo:
    """A registered adapter.

    Attributes:
        name: what requests call it.
        source: the folder or hub id it comes from.
        state: `loaded` in memory, `registered` but not in memory, `loading`, or `failed`.
        error: why it failed.
        nbytes: in memory, 0 while it is not.
        rank, targets, towers: what it is, known once it was read.
        classes: those of the head that was trained with it.
        requests: how many items it answered.
    """

    name: str
    source: str
    state: Literal["registered", "loading", "loaded", "failed"] = "registered"
    error: str = ""
    nbytes: int = 0
    rank: int | None = None
    targets: str = ""
    towers: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    requests: int = 0


@dataclass(frozen=True)
class FolderInfo:
    """An encoded folder that can be searched: its name, place, and number of rows, of images or texts."""

    name: str
    path: str
    rows: int
    kind: str


@dataclass(frozen=True)
class Description:
    """What is served.

    Attributes:
        base: the name that requests call the base by.
        fingerprint: of the base.
        dim: of its features.
        context_length: in tokens.
        device, dtype: where and in what it computes.
        adapters: registered, by name.
        folders: encoded folders that can be searched.
        towers: `text`, `vision` or both.
    """

    base: str
    fingerprint: str
    dim: int
    context_length: int
    device: str
    dtype: str
    adapters: tuple[AdapterInfo, ...] = ()
    folders: tuple[FolderInfo, ...] = ()
    towers: tuple[str, ...] = ("text", "vision")


@dataclass(frozen=True)
class Stats(Message["Statistics"]):
    """Ask for counters since the start."""


@dataclass(frozen=True)
class Statistics:
    """Counters and measurements of a service, for metrics; all since its start.

    Attributes:
        counts: monotonic counters by name: `items_text`, `items_image`, `batches_text`, `batches_image`,
            `adapter_hits`, `adapter_loads`, `adapter_evictions`, `rejected`, `expired`, `cancelled`.
        gauges: what is true now: `queue_text`, `queue_image` (items), `queue_seconds` (estimated),
            `adapters_loaded`, `adapter_bytes`, `rss_bytes`.
        seconds: by stage (`prepare`, `queue`, `adapter`, `compute`): observations by the upper bound of their
            bucket, not cumulative, `inf` last, with their `sum`.
        batch_sizes: rows of a batch, as the observations of a histogram likewise.
    """

    counts: Mapping[str, int]
    gauges: Mapping[str, float]
    seconds: Mapping[str, Mapping[str, float]]
    batch_sizes: Mapping[str, float]


class Backend(Protocol):
    """Whatever answers messages: a model in this process, in another one, or replicas elsewhere."""

    @property
    def state(self) -> State:
        """Whether a message would be answered now; `ready` only once a real one was."""

    async def answer(self, message: Message[Answer], *, timeout: float | None = None) -> Answer:
        """Answer a message within `timeout` seconds; cancelling the call withdraws what was not begun.

        Raises:
            OverloadedError: too much is waiting; come back after `retry_after` seconds.
            UnavailableError: the model is starting, was lost, drains, or the time was up.
            ClipgraftError: what the message itself raises.
        """

    async def close(self) -> None:
        """Finish what was accepted, accept nothing more, and free the model."""
