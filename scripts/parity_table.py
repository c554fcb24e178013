"""Print how far LoRA differs from explicit weights W + s·B·A, for every site role and model layout.

    python scripts/parity_table.py

Tiny random models in fp32 (the ones of the tests, width 32, two blocks a tower), rank 3, alpha 5, A and B
drawn from N(0, 0.3²). Forward is the largest absolute difference of the image and text features, over train
and eval mode, with and without gradients; gradient that of A and B after one backward pass. `effect` is how
far the adapter moves the features: what the differences are to be compared with.
"""

from __future__ import annotations

import copy
import itertools
import sys
from pathlib import Path

import open_clip
import torch
from torch import nn

import clipgraft as cg
from clipgraft.lora.state import require_lora

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "helpers"))

from explicit_lora import (
    ROLES,
    explicit_model,
    explicit_run,
    features,
    inputs,
    largest,
    loss_of,
    randomise_lora,
    target,
)
from open_clip_4 import to_4x
from tiny_models import TINY_OPENCLIP, build_hf, randomise


def layouts() -> dict[str, nn.Module]:
    """Return the compared models by column."""
    torch.manual_seed(0)
    release_3 = randomise(open_clip.CLIP(**copy.deepcopy(TINY_OPENCLIP))).eval()
    return {
        f"open_clip {open_clip.__version__}": release_3,
        "open_clip 4.x": to_4x(copy.deepcopy(release_3)),
        "transformers": build_hf(),
    }


def differences(base: nn.Module, targets: str) -> tuple[float, float, float]:
    """Measure forward, gradient and effect of an adapter on these targets."""
    model = copy.deepcopy(base)
    cg.apply_lora(model, r=3, alpha=5, targets=targets)
    updates = randomise_lora(model)
    explicit = explicit_model(base, updates)
    pixels, ids = inputs(base)
    forward = 0.0
    for train, grad in itertools.product((False, True), repeat=2):
        with torch.set_grad_enabled(grad):
            ours = features(model.train(train), pixels, ids)
            forward = max(forward, largest(ours, features(explicit.train(train), pixels, ids)))
            effect = largest(ours, features(base, pixels, ids))
    loss_of(ours).backward()
    leaves = {site: (a.requires_grad_(), b.requires_grad_(), s) for site, (a, b, s) in updates.items()}
    loss_of(explicit_run(base, leaves, lambda m: features(m, pixels, ids))).backward()
    layers = require_lora(model).layers
    found = {str(site): (layer.lora_A.grad, layer.lora_B.grad) for site, layer in layers.items()}
    gradient = max(largest(found[site], (a.grad, b.grad)) for site, (a, b, _) in leaves.items())
    return forward, gradient, effect


def main() -> None:
    """Print the table as Markdown."""
    models = layouts()
    print("| site role | " + " | ".join(f"{name}: forward | gradient | effect" for name in models) + " |")
    print("|---|" + "---|---|---|" * len(models))
    worst = [[0.0, 0.0] for _ in models]
    for role in [*ROLES, "attention", "all"]:
        cells = []
        for column, base in enumerate(models.values()):
            forward, gradient, effect = differences(base, target(role) if "." in role else role)
            worst[column] = [max(worst[column][0], forward), max(worst[column][1], gradient)]
            cells.append(f"{forward:.1e} | {gradient:.1e} | {effect:.2f}")
        print(f"| {role} | " + " | ".join(cells) + " |")
    print("| **largest** | " + " | ".join(f"{f:.1e} | {g:.1e} | " for f, g in worst) + " |")


if __name__ == "__main__":
    main()
