"""Options of training in one flat list, as tests write them, sorted into the groups that `fit` takes."""

from __future__ import annotations

from typing import Any

from clipgraft.data.args import FeatureArgs
from clipgraft.data.datasets import Pairs
from clipgraft.data.feature_cache import FeatureCache
from clipgraft.engine.encoder import Encoder
from clipgraft.models.clip import Clip
from clipgraft.options import Options
from clipgraft.train.args import DistillArgs, HeadArgs, RunArgs, TrainArgs
from clipgraft.train.inputs import Inputs, prepare_inputs
from clipgraft.train.setup import Setup

_GROUPS: dict[str, type[Options]] = {
    "run": RunArgs,
    "features": FeatureArgs,
    "head": HeadArgs,
    "weights": DistillArgs,
}
_OTHERS = ("prompts", "val", "world", "retain")


def groups(**options: Any) -> dict[str, Any]:
    """Arguments of `fit`, `fit_classifier` or `distill`; what belongs to no other group is TrainArgs'."""
    if isinstance(cache := options.pop("cache", None), FeatureCache):
        options |= {"feature_cache": cache.folder, "cache_gb": cache.room.max_bytes / 1e9}
    found: dict[str, Any] = {name: options.pop(name) for name in _OTHERS if name in options}
    for argument, kind in _GROUPS.items():
        own = {name: options.pop(name) for name in kind.model_fields if name in options}
        if own:
            found[argument] = kind(**own)
    return {**found, "train": TrainArgs(**options)}


def prepared(
    clip: Clip, pairs: Pairs, *, val: Pairs | None = None, encoder: Encoder | None = None, **options: Any
) -> Inputs:
    """What `prepare_inputs` makes of a model and flat options; no run is begun."""
    found = groups(out="unused", **options)
    setup = Setup(clip, found["train"], found["run"], found.get("features", FeatureArgs()))
    return prepare_inputs(setup, encoder or Encoder(clip, setup.features.autocast is True), pairs, val)
