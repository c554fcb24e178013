"""Bytes on disk of a run's results, in every form in which they can be shipped."""

from __future__ import annotations

from pathlib import Path

import clipgraft as cg
from benchmarks.conversions.file_rows import write_as
from benchmarks.conversions.model_rows import for_good
from benchmarks.conversions.world import World, adapted
from clipgraft.models.export import size_on_disk, write_model

_WHOLE = (
    ("open_clip checkpoint, .pt", "merged.pt", "open_clip"),
    ("open_clip folder", "open_clip", "open_clip"),
    ("transformers folder", "transformers", "transformers"),
    ("ONNX folder, both towers", "onnx", "onnx"),
)


def sizes(world: World) -> dict[str, int]:
    """Return bytes by artefact; the adapter is r=16 on the text tower's attention."""
    folder = world.place()
    clip = adapted(world, "open_clip", targets="text-attention")
    made: dict[str, Path] = {"adapter folder": cg.save_adapter(clip, folder / "adapter")}
    for name, form in (
        ("guide .pt", "guide"),
        ("CLIP-LoRA .pt", "clip-lora"),
        ("guide-full .pt", "guide-full"),
    ):
        made[name] = write_as(world, clip, form, folder / f"{form}.pt")  # type: ignore[arg-type]
    for_good(clip)
    for name, file, whole in _WHOLE:
        write_model(clip, folder / file, whole)  # type: ignore[arg-type]
        made[f"whole model, {name}"] = folder / file
    return {name: size_on_disk(path) for name, path in made.items()}
