"""The training loop of every peer, with timing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from benchmarks.child import reset_peak

LR, WEIGHT_DECAY, BETAS, EPS = 5e-4, 0.2, (0.9, 0.98), 1e-6


def adamw(
    model: torch.nn.Module, lr: float = LR, weight_decay: float = WEIGHT_DECAY, fused: bool | None = None
) -> torch.optim.AdamW:
    """Make AdamW with open_clip's hyper-parameters; parameters of fewer than two dimensions do not decay."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=BETAS, eps=EPS, fused=fused)


def timed_steps(
    batches: Iterable[Any],
    loss_of: Callable[[Any], Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    warmup: int,
    steps: int,
    autocast: bool,
    schedule: Callable[[int], float] | None = None,
) -> dict[str, Any]:
    """Train for warmup + steps; returns the seconds of each timed step, waiting for data included."""
    reset_peak()
    losses: list[float] = []
    seconds: list[float] = []
    batches = iter(batches)
    started = time.perf_counter()
    for step in range(warmup + steps):
        batch = next(batches)
        if schedule is not None:
            for group in optimizer.param_groups:
                group["lr"] = schedule(step)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
        now = time.perf_counter()
        seconds.append(now - started)
        started = now
    return {
        "step_seconds": seconds[warmup:],
        "losses": losses,
        "trained": sum(p.numel() for group in optimizer.param_groups for p in group["params"]),
    }
