"""Shared by the rows: one base in both families, inputs, and the comparison of outputs."""

from __future__ import annotations

import copy
import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

import clipgraft as cg
from clipgraft.models.convert import to_transformers
from clipgraft.models.sites import Tower

FAMILIES = ("open_clip", "transformers")
START, END = 49406, 49407
_ROWS = 4
_SIZE = 0.05  # B·A is then about a third as large as random base weights
_TINY = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 16, "layers": 2},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
_BLOCK = {"out": "attn.out_proj.weight", "fc1": "mlp.c_fc.weight", "fc2": "mlp.c_proj.weight"}

Features: TypeAlias = tuple[Tensor, ...]
Update: TypeAlias = tuple[Tensor, Tensor, float]


@dataclass(frozen=True)
class Outcome:
    """The result of one row.

    Attributes:
        absolute: the largest difference.
        share: the same over the largest wanted value; of several outputs, the worst.
        moved: how far the adapter moves the base's outputs, as such a share; None where that has no meaning.
        note: what the numbers count, where they are no features.
    """

    absolute: float
    share: float
    moved: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One direction of one conversion."""

    group: str
    name: str
    run: Callable[[World], Outcome]


@dataclass(frozen=True)
class World:
    """A base in both families with the same weights, and inputs for it.

    Attributes:
        bases: by family; never changed, copies are handed out.
        arch: what open_clip calls the architecture.
        pixels: (N, 3, H, W).
        ids: (N, context length), the end-of-text token somewhere in the middle.
        folder: for files, removed at the end.
    """

    bases: Mapping[str, cg.Clip]
    arch: str
    pixels: Tensor
    ids: Tensor
    folder: Path

    def fresh(self, family: str) -> cg.Clip:
        """Copy the base, to be adapted."""
        clip = self.bases[family]
        return dataclasses.replace(clip, model=copy.deepcopy(clip.model))

    def place(self) -> Path:
        """Make an empty folder."""
        return Path(tempfile.mkdtemp(dir=self.folder))

    def depth(self, tower: Tower) -> int:
        """Return the number of blocks of a tower."""
        sites = self.bases["open_clip"].sites
        return 1 + max(site.block or 0 for site in sites if site.tower == tower)

    def run(self, model: nn.Module) -> Features:
        """Compute image and text features with the model's own public functions, not normalised, fp32."""
        pixels = self.pixels.to(next(p.dtype for p in model.parameters() if p.ndim == 4))
        module: Any = model
        with torch.no_grad():
            if hasattr(model, "text_model"):
                image = module.get_image_features(pixel_values=pixels).pooler_output
                text = module.get_text_features(input_ids=self.ids).pooler_output
            else:
                image, text = module.encode_image(pixels), module.encode_text(self.ids)
        return image.float(), text.float()

    def compare(self, got: Features, wanted: Features) -> Outcome:
        """Compare two runs; `moved` is measured from the untouched base."""
        absolute, share = differences(got, wanted)
        return Outcome(absolute, share, differences(self.untouched, wanted)[1])

    @cached_property
    def untouched(self) -> Features:
        """Return the base's features of the inputs."""
        return self.run(self.bases["open_clip"].model)


def make_world(folder: Path, tiny: bool = False) -> World:
    """Build a random ViT-B-32 at full size, or a tiny model."""
    import open_clip

    arch, name = "ViT-B-32", "ViT-B-32"
    if tiny:
        arch = "clipgraft-tiny"
        name = str(folder / f"{arch}.json")
        Path(name).write_text(json.dumps(_TINY), encoding="utf-8")
        open_clip.add_model_config(name)
    clip = cg.load(name, "none")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        # Fresh biases are zero and fresh norms one: swapping two of them would go unnoticed.
        for parameter in clip.model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=_SIZE)
    size = int(clip.require_preprocess()(_picture()).shape[-1])
    ids = torch.randint(1, START, (_ROWS, clip.context_length), generator=generator)
    for row in range(_ROWS):
        ids[row, 0], ids[row, 9 + row], ids[row, 10 + row :] = START, END, 0
    pixels = torch.randn(_ROWS, 3, size, size, generator=generator)
    bases = {"open_clip": clip.eval(), "transformers": cg.Clip.over(to_transformers(clip)).eval()}
    return World(bases, arch, pixels, ids, folder)


def _picture() -> Any:
    from PIL import Image

    return Image.new("RGB", (300, 300))


def differences(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> tuple[float, float]:
    """Return the largest difference, absolute and as a share of the largest value of its tensor."""
    pairs = [(float((g - w).abs().max()), float(w.abs().max())) for g, w in zip(got, wanted, strict=True)]
    return max(gap for gap, _ in pairs), max(gap / size for gap, size in pairs)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's generator, from which new adapters draw."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Move all trainable parameters by random amounts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=_SIZE)


def adapted(world: World, family: str, seed: int = 0, **options: Any) -> cg.Clip:
    """Load a base with a trained adapter of ours; options are those of `apply_lora`."""
    clip = world.fresh(family)
    apply_trained(clip, seed, **options)
    return clip


def apply_trained(clip: cg.Clip, seed: int, **options: Any) -> None:
    """Apply LoRA and random training, the same for one seed."""
    with seeded(seed):
        cg.apply_lora(clip, **{"r": 16, **options})
    randomise(clip.model, seed)


def pair(inner: int, out: int, r: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw random A (r, inner) and B (out, r)."""
    a = torch.randn(r, inner, generator=generator) * _SIZE
    return a, torch.randn(out, r, generator=generator) * _SIZE


def explicit(base: nn.Module, updates: Mapping[str, Update]) -> nn.Module:
    """Copy an open_clip model and write W + s·B·A into attention and MLP weights, by site name."""
    model = copy.deepcopy(base)
    named = dict(model.named_parameters())
    with torch.no_grad():
        for site, (a, b, scale) in updates.items():
            tower, block, role = site.split(".")
            prefix = f"{'visual.' if tower == 'vision' else ''}transformer.resblocks.{block}."
            if role in ("q", "k", "v"):
                weight = named[f"{prefix}attn.in_proj_weight"].chunk(3)["qkv".index(role)]
            else:
                weight = named[f"{prefix}{_BLOCK[role]}"]
            weight.add_(scale * (b @ a))
    return model


def by_family(group: str, name: str, function: Callable[[World, str], Outcome]) -> list[Row]:
    """Make one row for each family; `{}` in the name stands for the family."""
    return [Row(group, name.format(family), partial(_in_family, function, family)) for family in FAMILIES]


def _in_family(function: Callable[[World, str], Outcome], family: str, world: World) -> Outcome:
    return function(world, family)
