"""Names of metrics, which of them are shown where, and a dict that prints them. Nothing here loads torch.

| here, as in open_clip | here, as in CLIP_benchmark | query | gallery |
|---|---|---|---|
| `image_to_text_R@k` | `text_retrieval_recall@k` | an image | captions |
| `text_to_image_R@k` | `image_retrieval_recall@k` | a caption | images |
| `source_to_target_R@k` | | a text, by the base | translations |
| `target_to_source_R@k` | | a translation | texts, by the base |

Both names of a row hold the same number: the share of queries with a true item among the first k. With
several captions an image, an image counts once and its best caption decides, as in CLIP_benchmark
(`recall > 0`); open_clip itself knows one caption an image. `…_mean_rank` and `…_median_rank` are 1-based and
follow open_clip, which rounds a median between two ranks down.

Ties: both libraries let the order of the table decide among equal scores (`argsort`, `topk`), so a model that
returns one constant vector may get anything from 0 to 100 % from them. Here every tie counts against the
query, and such a model gets the last rank (see `ranks.py`). Without ties the numbers are the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from clipgraft.notebook_tables import Tabled
from clipgraft.text_tables import NOTHING, Column, Table, share, table_of

DEFAULT_KS = (1, 5, 10)
TaskName = Literal["retrieval", "classification", "translation"]
DIRECTIONS = ("image_to_text", "text_to_image")
BETWEEN_TEXTS = ("source_to_target", "target_to_source")
REPORTED: Mapping[TaskName, tuple[str, ...]] = {
    "retrieval": tuple(
        f"{direction}_{name}"
        for direction in DIRECTIONS
        for name in (*(f"R@{k}" for k in DEFAULT_KS), "mean_rank", "median_rank")
    ),
    "classification": ("acc1", "acc5", "mean_per_class_recall", "ece", "loss"),
    "translation": (
        *(f"{direction}_R@{k}" for direction in BETWEEN_TEXTS for k in DEFAULT_KS),
        "teacher_cosine",
    ),
}
"""Every metric of a task that tables show, each under one name."""
HEADLINE: Mapping[TaskName, tuple[str, ...]] = {
    "retrieval": tuple(f"{direction}_R@{k}" for direction in DIRECTIONS for k in (1, 5)),
    "classification": ("acc1", "acc5", "mean_per_class_recall"),
    "translation": (*(f"{direction}_R@1" for direction in BETWEEN_TEXTS), "teacher_cosine"),
}
"""The metrics that people look at first, all of them shares."""
DECISIVE: Mapping[TaskName, tuple[str, ...]] = {
    "retrieval": tuple(f"{direction}_R@1" for direction in DIRECTIONS),
    "classification": ("acc1",),
    "translation": tuple(f"{direction}_R@1" for direction in BETWEEN_TEXTS),
}
"""The metrics by which models are compared and epochs chosen."""


MEASURED_ON: Mapping[TaskName, str] = {
    "retrieval": "images",
    "classification": "images",
    "translation": "sentences",
}
"""What the queries of a task belong to."""


def task_of(metrics: Iterable[str]) -> TaskName:
    """Return the task that the names of metrics belong to.

    A run that has pictures beside translations measures retrieval, and translation besides.
    """
    names = set(metrics)
    if "acc1" in names:
        return "classification"
    is_of_texts = names.isdisjoint(DECISIVE["retrieval"]) and not names.isdisjoint(DECISIVE["translation"])
    return "translation" if is_of_texts else "retrieval"


def headline(metrics: Mapping[str, float]) -> str:
    """Format the headline metrics in percent, on one line."""
    names = [name for name in HEADLINE[task_of(metrics)] if name in metrics]
    return ", ".join(f"{name} {100 * metrics[name]:.1f} %" for name in names)


class Metrics(Tabled, dict[str, float]):
    """Metrics by name: a plain dict that prints those that tables show, a line for each direction.

    In a notebook, and in `to_pandas`, a direction is a row.
    """

    def __repr__(self) -> str:
        names = [name for name in REPORTED[task_of(self)] if name in self]
        if not names:
            return super().__repr__()
        table = self.table()
        lines = []
        for direction, *cells in table.rows:
            named = (f"{n} {c}" for n, c in zip(table.columns[1:], cells, strict=True) if c != NOTHING)
            lines.append(f"{direction}{direction and ': '}{', '.join(named)}")
        return "\n".join(lines)

    def table(self) -> Table:
        """A row for each direction, or one of classification; shares as fractions."""
        rows: dict[str, dict[str, float]] = {}
        for name in REPORTED[task_of(self)]:
            if name in self:
                direction = next((d for d in _ALL_DIRECTIONS if name.startswith(d)), "")
                rows.setdefault(direction, {})[name.removeprefix(f"{direction}_")] = self[name]
        names = list(dict.fromkeys(name for row in rows.values() for name in row))
        values: list[list[Any]] = [[d, *(row.get(name) for name in names)] for d, row in rows.items()]
        return table_of("", [Column("", left=True), *map(metric_column, names)], values)


def metric_column(name: str) -> Column:
    """The column of a metric: shares in percent, ranks and losses as numbers."""
    return Column(name, share if is_share(name) else _number)


def is_share(name: str) -> bool:
    """Whether a metric, named with its direction or without, is a share of the queries."""
    direction = next((d for d in _ALL_DIRECTIONS if name.startswith(d)), "")
    return name.removeprefix(f"{direction}_").startswith(_SHARES)


_ALL_DIRECTIONS = (*DIRECTIONS, *BETWEEN_TEXTS)
_SHARES = ("R@", "acc", "mean_per_class")


def _number(value: float) -> str:
    return f"{value:.4g}"


class Comparison(Tabled, dict[str, Mapping[str, float]]):
    """Metrics of several models by their names: a dict that a notebook shows with a row for each model.

    `Comparison(base=one, adapter=other)` takes what `evaluate_retrieval` returned, or the `metrics` of a
    `FitResult` or a classification.
    """

    def table(self) -> Table:
        """A row for each model, with the metrics that tables show; shares as fractions."""
        known = (name for task in REPORTED.values() for name in task)
        names = [name for name in known if any(name in metrics for metrics in self.values())]
        columns = [Column("model", left=True), *map(metric_column, names)]
        rows = ([model, *(metrics.get(name) for name in names)] for model, metrics in self.items())
        return table_of("", columns, rows)
