"""Options of few-shot modes, and of their comparison."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from clipgraft.options import (
    Batch,
    CacheSharpness,
    CacheWeight,
    Count,
    LossWeight,
    Options,
    Rate,
    Seeds,
    Views,
    words,
)

ModeName = Literal["clip-lora", "2sfs", "tip-adapter", "tip-adapter-f", "prolip", "linear-probe"]
MODES: tuple[ModeName, ...] = ("clip-lora", "2sfs", "tip-adapter", "tip-adapter-f", "prolip", "linear-probe")
Setting = Literal["all", "base-to-novel"]


def _distinct(value: Any) -> Any:
    found = words(value)
    if isinstance(found, tuple) and len(set(found)) < len(found):
        raise ValueError("each of them once")
    return found


class FeatureModeArgs(Options):
    """Settings of the modes that train on features; left open, each is what the mode's paper fixes."""

    cache_weight: CacheWeight = Field(
        1.0, ge=0, description="Tip-Adapter: weight of the cached images beside the class texts (alpha)"
    )
    cache_sharpness: CacheSharpness = Field(
        5.5, gt=0, description="Tip-Adapter: how fast a cached image loses influence with distance (beta)"
    )
    feature_epochs: Count | None = Field(
        None,
        ge=0,
        description="passes over the features (default: 20 of Tip-Adapter-F, 300 of ProLIP; at most 200 of "
        "the linear probe, which stops at its minimum)",
    )
    feature_lr: Rate | None = Field(
        None,
        gt=0,
        description="peak learning rate of Tip-Adapter-F (default: 1e-3) and ProLIP (default: 1e-4)",
    )
    penalty: LossWeight | None = Field(
        None,
        ge=0,
        description="weight of the squared distance to the start (default: ProLIP 1/shots; linear probe: "
        "the inverse temperature)",
    )


class FewShotArgs(FeatureModeArgs):
    """Which modes are compared, on how many images a class; each mode's settings are those of its paper."""

    modes: Annotated[tuple[ModeName, ...], BeforeValidator(_distinct)] = Field(
        MODES, min_length=1, description=f"modes to compare, joined by commas: {', '.join(MODES)}"
    )
    shots: Annotated[tuple[Annotated[Batch, Field(ge=1)], ...], BeforeValidator(_distinct)] = Field(
        (1, 2, 4, 8, 16), min_length=1, description="training images of each class, joined by commas"
    )
    seeds: Seeds = Field(
        3, ge=1, description="draws of these images, and trainings, for every number of them"
    )
    seed: int = Field(1, ge=0, lt=2**31, description="the first seed; the others follow")
    setting: Setting = Field(
        "all",
        description="all: train and test on all classes; base-to-novel: train on the first half of the "
        "classes, test on it and on the other half",
    )
    steps_per_shot: Count | None = Field(
        None,
        ge=1,
        description="training steps of clip-lora and 2sfs for each shot (default: their papers' 500 and 300)",
    )
    views: Views = Field(
        10, ge=1, description="random crops of each training image that the modes on features see; 1: whole"
    )

    @property
    def all_seeds(self) -> range:
        """The seeds, in order."""
        return range(self.seed, self.seed + self.seeds)
