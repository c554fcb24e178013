"""The options of a LoRA adapter, and a rank for those who leave it open."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from clipgraft.errors import ConfigError

Bias = Literal["none", "lora_only", "all"]
Start = Literal["default", "pissa", "eva"]
Task = Literal["classification", "retrieval"]
_MOST_ALPHA = 1e9
_SIZES = (10_000, 50_000, 100_000)
_RANKS: dict[Task, tuple[int, ...]] = {"classification": (4, 8, 16, 32), "retrieval": (8, 16, 32, 64)}


@dataclass(frozen=True)
class LoraConfig:
    """What `apply_lora` was asked for, as adapter files record it."""

    r: int = 16
    alpha: float = 16
    dropout: float = 0.0
    targets: str = "text-attention"
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    train_logit_scale: bool = False
    use_dora: bool = False
    bias: Bias = "none"
    init: Start = "default"


def check_settings(settings: LoraConfig, ranks: Iterable[int], alphas: Iterable[float]) -> None:
    """Raise ConfigError, with all faults at once, if a rank, alpha or dropout is out of range."""
    faults = [f"r must be a whole number from 1 up, got {r}" for r in (settings.r, *ranks) if not _is_rank(r)]
    faults += [
        f"alpha must be a positive number, got {alpha:g}"
        if not alpha > _MOST_ALPHA
        else f"alpha above {_MOST_ALPHA:g} takes updates out of the range of fp32, got {alpha:g}"
        for alpha in (settings.alpha, *alphas)
        if not 0 < alpha <= _MOST_ALPHA
    ]
    if not 0 <= settings.dropout < 1:
        faults.append(f"dropout must be in [0, 1), got {settings.dropout:g}")
    for name, allowed in (("bias", Bias), ("init", Start)):
        if getattr(settings, name) not in allowed.__args__:  # type: ignore[attr-defined]
            choices = ", ".join(allowed.__args__)  # type: ignore[attr-defined]
            faults.append(f"{name} must be one of {choices}, got {getattr(settings, name)!r}")
    if faults:
        raise ConfigError("LoRA: " + "; ".join(dict.fromkeys(faults)))


def _is_rank(r: object) -> bool:
    return isinstance(r, int) and not isinstance(r, bool) and r >= 1


def auto_rank(samples: int, task: Task) -> tuple[int, str]:
    """The rank for a number of training pairs, and the reason in words.

    Retrieval gets 8, 16, 32 or 64 below 10,000, below 50,000, up to 100,000 and beyond; telling a few classes
    apart takes half of that. Both stay within what is commonly advised for these sizes.
    """
    place = bisect.bisect_right(_SIZES, samples)
    bounds = ("fewer than 10,000", "10,000 to 50,000", "50,000 to 100,000", "100,000 or more")
    rank = _RANKS[task][place]
    return rank, f"r={rank} for {task} with {samples:,} pairs ({bounds[place]})"
