"""Write the results folder of a run: result.json, layer table (summary.txt), structure (structure.txt)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from clipgraft.files import write_json, write_text
from clipgraft.models.clip import Clip
from clipgraft.profile.forward import costs
from clipgraft.profile.measure import median_seconds
from clipgraft.profile.tables import layer_table, structure

RESULTS = "results"


def write_results(
    clip: Clip,
    folder: Path,
    metrics: Mapping[str, float] | None = None,
    base: Mapping[str, float] | None = None,
) -> None:
    """Write what a model is, what it costs and what it reached into `folder`.

    `result.json` has the model's class, the floating-point operations, multiply-adds and seconds of one
    forward pass of one image and one text of full length, adapter included, the numbers of weights, and
    `test_result`: a list with the metrics, empty if nothing was measured, and `base_result` the same before
    the first step. Operations are counted on the meta
    device, the adapter's as in training (`clipgraft.profile.ops`); the seconds are the median of a few passes
    on the model's own device.

    Args:
        clip: the model as the run left it.
        folder: where to write; files of an older run are replaced.
        metrics: names and numbers of what the run kept.
        base: the same before the first step.

    Raises:
        ModelError: a tower that does not take images of its own size.
    """
    profile = costs(clip)
    total = profile.trace.total
    write_json(
        folder / "result.json",
        {
            "model_type": f"{type(clip.model).__module__}.{type(clip.model).__qualname__}",
            "flops": profile.flops,
            "macs": profile.macs,
            "params": total.parameters,
            "trainable_params": total.trainable,
            "run_time": _forward_seconds(clip),
            "device": str(clip.device),
            "dtype": str(clip.dtype).removeprefix("torch."),
            "test_result": [] if metrics is None else [dict(metrics)],
            "base_result": [] if base is None else [dict(base)],
        },
    )
    write_text(folder / "summary.txt", layer_table(profile.trace) + "\n")
    write_text(folder / "structure.txt", structure(clip.model) + "\n")


def _forward_seconds(clip: Clip) -> float:
    """Time one image and one text through both towers."""
    height, width = clip.family.image_size(clip.model)
    pixels = torch.zeros(1, 3, height, width, device=clip.device, dtype=clip.dtype)
    tokens = torch.zeros(1, clip.context_length, device=clip.device, dtype=torch.int64)
    family, model = clip.family, clip.model
    return median_seconds(
        lambda: (family.encode_image(model, pixels), family.encode_text(model, tokens)), clip.device
    )
