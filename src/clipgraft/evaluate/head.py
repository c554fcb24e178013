"""A trained classifier on image features, and its files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clipgraft.errors import CheckpointError
from clipgraft.files import atomic_path, write_json
from clipgraft.writing import size_of

HEAD_FILE, CLASSES_FILE = "head.safetensors", "classes.json"
HeadKind = Literal["linear", "cosine"]


class Head(nn.Module):
    """A classifier on image features that starts as the classes' prompts say.

    `linear` gives x·Wᵀ + b on unit-norm x; `cosine` keeps the rows of W at unit norm and has no bias. Both
    multiply by the inverse temperature that the model had when the head was made, so that a new head predicts
    what zero-shot classification does.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    scale: Tensor

    def __init__(self, kind: HeadKind, prototypes: Tensor, scale: float) -> None:
        """`prototypes`: (C, D) unit-norm class features."""
        super().__init__()
        self.kind: HeadKind = kind
        self.weight = nn.Parameter(prototypes.detach().clone().float())
        self.bias = nn.Parameter(torch.zeros(len(prototypes))) if kind == "linear" else None
        self.register_buffer("scale", torch.tensor(float(scale)))

    def forward(self, images: Tensor) -> Tensor:
        """(N, D) image features, any norm -> (N, C) logits, fp32."""
        weight = self.weight if self.kind == "linear" else F.normalize(self.weight, dim=-1)
        logits = F.linear(F.normalize(images.float(), dim=-1), weight) * self.scale
        return logits if self.bias is None else logits + self.bias


def save_head(head: Head, classes: Sequence[str], folder: Path) -> None:
    """Write `head.safetensors` and `classes.json`, whole or not at all."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
    with atomic_path(folder / HEAD_FILE, size_of(tensors)) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    write_json(folder / CLASSES_FILE, {"kind": head.kind, "classes": list(classes)})


def load_head(folder: Path) -> tuple[Head, tuple[str, ...]]:
    """A saved head and the names of its classes.

    Raises:
        CheckpointError: there is none, or its files are damaged or do not belong together.
    """
    try:
        record = json.loads((folder / CLASSES_FILE).read_text(encoding="utf-8"))
        tensors = load_file(folder / HEAD_FILE)
        head = Head(record["kind"], tensors["weight"], float(tensors["scale"]))
        head.load_state_dict(tensors)
        classes = tuple(str(name) for name in record["classes"])
        if len(classes) != len(head.weight):
            raise ValueError(f"{len(classes)} classes for {len(head.weight)} rows")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"no head to read in {folder} ({type(error).__name__}): train one with `head=linear` "
            "or `head=cosine`"
        ) from error
    return head, classes
