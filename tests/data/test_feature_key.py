"""What tells features apart: every bit of the image tower, how it is used, and each step before it."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import transforms as tv

import clipgraft as cg
from clipgraft.data.feature_key import (
    UnknownError,
    describe,
    image_key,
    tower_fingerprint,
    vision_lora_is_active,
)
from clipgraft.data.loading import SeededView
from clipgraft.data.stored_rows import RowKind
from clipgraft.models.clip import as_clip
from clipgraft.models.processors import HfPreprocess
from tiny_models import in_every_layout


def test_adapters_and_training_leave_the_tower_what_it_is(
    tiny_openclip: nn.Module, tiny_openclip_4x: nn.Module
) -> None:
    """A run would encode again what the one before it has encoded, or `eval` what `train` has."""
    for layout, model in in_every_layout(tiny_openclip, tiny_openclip_4x).items():
        clip = as_clip(model)
        before = tower_fingerprint(clip)
        assert tower_fingerprint(as_clip(copy.deepcopy(model))) == before, layout
        cg.apply_lora(clip, r=2, targets="all-linear,vision.position_embedding,vision.patch_embedding")
        assert vision_lora_is_active(clip)
        assert tower_fingerprint(clip) == before, layout
        with cg.lora_disabled(clip):
            assert not vision_lora_is_active(clip)
        cg.remove_lora(clip)
        assert not vision_lora_is_active(clip)
        clip.train().model.requires_grad_(False)
        clip.family.set_grad_checkpointing(clip.model, True)
        with torch.no_grad():
            for parameter in clip.family.tower_groups(clip.model, "text")[0]:
                parameter.add_(1)
        assert tower_fingerprint(clip) == before, layout


def test_a_text_adapter_does_not_act_on_images(tiny_openclip: nn.Module) -> None:
    """The cache would be off in the project's most frequent run."""
    cg.apply_lora(tiny_openclip, r=2, targets="text-attention")
    assert not vision_lora_is_active(as_clip(tiny_openclip))


def test_every_weight_of_the_image_tower_counts_to_its_last_bit(
    tiny_openclip: nn.Module, tiny_openclip_4x: nn.Module
) -> None:
    """A base that was tuned a little would be measured with the features of the untuned one."""
    for model in in_every_layout(tiny_openclip, tiny_openclip_4x).values():
        clip = as_clip(model)
        seen = {tower_fingerprint(clip)}
        tower = [p for group in clip.family.tower_groups(clip.model, "vision") for p in group]
        for parameter in tower:
            flat = parameter.data.view(-1)
            flat[0] = torch.nextafter(flat[0], torch.tensor(100.0))
            seen.add(tower_fingerprint(clip))
        assert len(seen) == len(tower) + 1
        seen.add(tower_fingerprint(clip.to(torch.bfloat16)))
        assert len(seen) == len(tower) + 2


def test_the_same_weights_used_otherwise_are_another_tower(
    tiny_openclip: nn.Module, tiny_hf: nn.Module
) -> None:
    """ViT-B-32 and ViT-B-32-quickgelu take the same weights and give other features."""
    clip, block = as_clip(tiny_openclip), tiny_openclip.visual.transformer.resblocks[1]
    seen = [tower_fingerprint(clip)]
    block.mlp.gelu = nn.GELU()
    seen.append(tower_fingerprint(clip))
    block.attn.num_heads = 1
    seen.append(tower_fingerprint(clip))
    tiny_openclip.visual.pool_type = "avg"
    seen.append(tower_fingerprint(clip))
    layer = tiny_hf.vision_model.encoder.layers[0]
    seen.append(tower_fingerprint(as_clip(tiny_hf)))
    layer.layer_norm1.eps = 1e-3
    seen.append(tower_fingerprint(as_clip(tiny_hf)))
    assert len(set(seen)) == len(seen)


def compose(**changes: Any) -> tv.Compose:
    """A preprocessing as open_clip makes it."""
    bicubic = tv.InterpolationMode.BICUBIC
    options: dict[str, Any] = {"size": 32, "interpolation": bicubic, "crop": 32, "mean": 0.5, **changes}
    return tv.Compose(
        [
            tv.Resize(options["size"], interpolation=options["interpolation"]),
            tv.CenterCrop(options["crop"]),
            tv.ToTensor(),
            tv.Normalize((options["mean"],) * 3, (0.5, 0.5, 0.5)),
        ]
    )


def test_every_parameter_of_the_preprocessing_counts() -> None:
    """Features of images in one size would be used for another."""
    known = describe(compose())
    assert describe(compose()) == known
    bilinear = tv.InterpolationMode.BILINEAR
    for change in ({"size": 33}, {"interpolation": bilinear}, {"crop": 30}, {"mean": 0.4}):
        assert describe(compose(**change)) != known
    swapped = compose()
    swapped.transforms[:2] = swapped.transforms[1::-1]
    assert describe(swapped) != known
    assert describe(tv.RandomErasing(0.5)) != describe(tv.RandomErasing(0.6))


def test_a_processor_of_transformers_counts_too(hf_folder: Path) -> None:
    """transformers bases bring no torchvision transform."""
    from transformers import CLIPImageProcessor

    first, same, other = (
        HfPreprocess(CLIPImageProcessor.from_pretrained(hf_folder, **options))
        for options in ({}, {}, {"resample": 2})
    )
    assert describe(first) == describe(same) != describe(other)


def halve(tensor: torch.Tensor, by: float = 2.0) -> torch.Tensor:
    """A step of somebody's own."""
    return tensor / by


class Scale:
    """Somebody's own transform, with private state."""

    __slots__ = ("_by",)

    def __init__(self, by: object) -> None:
        self._by = by

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor * self._by


def test_steps_of_ones_own_count() -> None:
    """Most people's augmentations are their own code."""
    steps = [
        halve,
        functools.partial(halve, by=3.0),
        functools.partial(halve, by=4.0),
        Scale(1),
        Scale(2),
        Scale(torch.ones(3)),
        Scale(torch.zeros(3)),
        Scale(np.ones(3)),
        Scale({"a": (1, 2)}),
        Scale(Scale(1)),
        Scale(torch.float16).__call__,
        torch.relu,
    ]
    assert len({describe(step) for step in steps}) == len(steps)
    assert describe(Scale(torch.ones(3))) == describe(Scale(torch.ones(3)))


def local() -> Callable[[object], object]:
    number = random.random()
    return lambda image: (image, number)


def test_what_cannot_be_told_apart_is_not_cached() -> None:
    """Two lambdas look alike; features made with one would be used for the other."""
    loop = Scale(1)
    loop._by = loop
    steps = [lambda image: image, local(), tv.Compose([local()]), Scale(object()), Scale(loop)]
    for step in steps:
        with pytest.raises(UnknownError):
            describe(step)


def test_precision_and_kind_are_in_the_key(tiny_openclip: nn.Module) -> None:
    """bf16 features would be taken for fp32 ones."""
    clip, steps = as_clip(tiny_openclip), compose()
    keys = {
        image_key(clip, steps).digest,
        image_key(clip, steps, autocast=True).digest,
        image_key(clip, steps, RowKind(dtype=torch.bfloat16)).digest,
        image_key(clip, steps, RowKind("input of vision block 1")).digest,
        image_key(clip.to(torch.bfloat16), steps).digest,
    }
    assert len(keys) == 5


def test_views_depend_on_seed_number_and_image_alone() -> None:
    """A cached view would differ from the one that a run without the cache sees."""
    noise = np.random.default_rng(0)
    first, second = (Image.fromarray(noise.integers(0, 255, (40, 40, 3), dtype=np.uint8)) for _ in range(2))
    crop = tv.Compose([tv.RandomCrop(20), tv.ToTensor()])
    torch.manual_seed(0)
    state = torch.get_rng_state()
    view = SeededView(crop, 5, 1)(first)
    assert torch.equal(torch.get_rng_state(), state), "the run's own random numbers"
    torch.manual_seed(1)
    assert torch.equal(SeededView(crop, 5, 1)(first), view)
    for other in (SeededView(crop, 5, 0), SeededView(crop, 6, 1)):
        assert not torch.equal(other(first), view)
        assert describe(other) != describe(SeededView(crop, 5, 1))
    assert not torch.equal(SeededView(crop, 5, 1)(second), view)
