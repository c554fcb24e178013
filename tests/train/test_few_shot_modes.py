"""CLIP-LoRA and 2SFS beside their published algorithms, written out in plain torch."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import clipgraft as cg
from clipgraft.data.augmentation import CropAndFlip, crop_and_flip
from clipgraft.data.datasets import Labelled
from clipgraft.lora.state import require_lora
from clipgraft.models.clip import Clip, as_clip
from clipgraft.train.fewshot import towers
from clipgraft.train.fewshot.towers import Job, OnClasses, tuned_by_clip_lora, tuned_by_two_stages
from clipgraft.train.loop import Loop
from explicit_lora import explicit_run
from tiny_dual import build as build_dual
from tiny_siglip import Letters, build_siglip
from tiny_towers import build_tower

PROMPTS = (("a photo of a cat.",), ("a photo of a dog.",), ("a photo of an owl.",))
STEPS, LR = 6, 2e-4


@pytest.fixture
def few(tmp_path: Path) -> Labelled:
    """Nine noise images of three classes, at the size of the tiny model."""
    noise, images = np.random.default_rng(0), []
    for number in range(9):
        path = tmp_path / f"{number}.png"
        Image.fromarray(noise.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
        images.append(path)
    return Labelled(tuple(images), (0, 1, 2) * 3, ("cat", "dog", "owl"))


@pytest.fixture
def job(few: Labelled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """Six steps on whole images: the oracle knows of no crops, and draws no dropout."""

    def whole(self: CropAndFlip, image: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        return (pixels - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]

    monkeypatch.setattr(CropAndFlip, "__call__", whole)
    monkeypatch.setattr(towers, "CLIP_LORA", towers.CLIP_LORA.replace(dropout=0.0))
    features = cg.FeatureArgs(workers=0, autocast=False)
    return Job(few, PROMPTS, STEPS, 3, tmp_path / "cell", features)


def pixels_of(clip: Clip, few: Labelled) -> Tensor:
    crop = crop_and_flip(clip.require_preprocess())
    return torch.stack([crop(Image.open(path)) for path in few.images])


def cosine(optimizer: torch.optim.Optimizer, steps: int) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=1e-6)


def loss_of(images: Tensor, texts: Tensor, scale: Tensor, few: Labelled) -> Tensor:
    logits = scale.exp() * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    return F.cross_entropy(logits, torch.tensor(few.labels))


def losses(run: Path) -> list[float]:
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [event["loss"] for event in events if event["kind"] == "train"]


def gradient_directions(run: Path) -> list[Tensor]:
    """AdamW's first moments at the end of a run, in the order of the weights."""
    state = torch.load(run / "checkpoints" / "latest.pt", weights_only=True)["optimizer"]["state"]
    return [state[number]["exp_avg"] for number in sorted(state)]


def test_clip_lora_is_its_published_algorithm(clip: Clip, job: Job, few: Labelled) -> None:
    """What is called CLIP-LoRA trains other weights, by another loss, or at another learning rate."""
    base, pixels = copy.deepcopy(clip.model), pixels_of(clip, few)
    tokens = clip.tokenize([text for texts in PROMPTS for text in texts])
    with tuned_by_clip_lora(clip, job):
        layers = require_lora(clip).layers
        found = {str(site): (layer.lora_A.detach(), layer.lora_B.detach()) for site, layer in layers.items()}
        assert all(layer.scaling == pytest.approx(1 / 2**0.5) for layer in layers.values())
    blocks = [f"{tower}.{block}" for tower in ("text", "vision") for block in (0, 1)]
    assert set(found) == {f"{block}.{role}" for block in blocks for role in "qkv"}

    torch.manual_seed(3)
    again = copy.deepcopy(clip)
    cg.apply_lora(again, r=2, alpha=1, use_rslora=True, targets="*.*.q+k+v")
    trained = {
        str(site): (layer.lora_A.detach().clone(), layer.lora_B.detach().clone())
        for site, layer in require_lora(again).layers.items()
    }
    weights = [weight.requires_grad_() for pair in trained.values() for weight in pair]
    optimizer = torch.optim.AdamW(weights, lr=LR, weight_decay=1e-2, betas=(0.9, 0.999))
    schedule, theirs = cosine(optimizer, STEPS), []
    for _ in range(STEPS):
        images, texts = explicit_run(
            base,
            {site: (a, b, 1 / 2**0.5) for site, (a, b) in trained.items()},
            lambda model: (model.encode_image(pixels), model.encode_text(tokens)),
        )
        loss = loss_of(images, texts, base.logit_scale.detach(), few)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        theirs.append(loss.item())

    assert losses(job.folder / "run") == pytest.approx(theirs, rel=1e-4)
    assert theirs[-1] < theirs[0]
    for site, (a, b) in trained.items():
        for ours, wanted in zip(found[site], (a, b), strict=True):
            torch.testing.assert_close(ours, wanted.detach(), rtol=0, atol=0.03 * STEPS * LR)
    # Row order is shuffled, which changes the mean by rounding alone.
    wanted_moments = [optimizer.state[weight]["exp_avg"].norm().item() for weight in weights]
    ours_moments = [moment.norm().item() for moment in gradient_directions(job.folder / "run")]
    assert sorted(ours_moments) == pytest.approx(sorted(wanted_moments), rel=1e-2, abs=1e-9)


def norms_of(model: nn.Module) -> list[nn.Parameter]:
    return [p for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()]


def test_2sfs_is_its_published_algorithm(
    clip: Clip, job: Job, few: Labelled, caplog: pytest.LogCaptureFixture
) -> None:
    """What is called 2SFS tunes other weights than layer norms, its steps are split otherwise."""
    caplog.set_level("INFO")
    model, pixels = copy.deepcopy(clip.model), pixels_of(clip, few)
    tokens = clip.tokenize([text for texts in PROMPTS for text in texts])
    before = {name: tensor.clone() for name, tensor in clip.model.state_dict().items()}
    with tuned_by_two_stages(clip, job) as tuned:
        changed = {n for n, tensor in clip.model.state_dict().items() if not torch.equal(tensor, before[n])}
        ours = [parameter.detach().clone() for parameter in norms_of(clip.model)]
    head = load_file(job.folder / "classifier" / "head" / "head.safetensors")["weight"]
    named = dict(clip.model.named_parameters())
    own = {id(p) for p in norms_of(clip.model)}
    assert changed == {name for name, parameter in named.items() if id(parameter) in own}
    assert all(torch.equal(tensor, before[name]) for name, tensor in clip.model.state_dict().items())

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    norms = [parameter.requires_grad_() for parameter in norms_of(model)]
    first = int(0.6 * STEPS)
    optimizer = torch.optim.AdamW(norms, lr=LR, weight_decay=1e-2, betas=(0.9, 0.999))
    schedule, theirs = cosine(optimizer, first), []
    for _ in range(first):
        loss = loss_of(model.encode_image(pixels), model.encode_text(tokens), model.logit_scale, few)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        theirs.append(loss.item())
    with torch.no_grad():
        images = model.encode_image(pixels)
        classifier = F.normalize(model.encode_text(tokens), dim=-1)
    classifier.requires_grad_()
    optimizer = torch.optim.AdamW([classifier], lr=LR, weight_decay=1e-2, betas=(0.9, 0.999))
    schedule, second = cosine(optimizer, STEPS - first), []
    for _ in range(STEPS - first):
        loss = loss_of(images, classifier, model.logit_scale, few)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        second.append(loss.item())

    assert losses(job.folder / "norms") == pytest.approx(theirs, rel=1e-4)
    assert losses(job.folder / "classifier") == pytest.approx(second, rel=1e-4)
    for found, wanted in zip(ours, norms, strict=True):
        torch.testing.assert_close(found, wanted.detach(), rtol=0, atol=0.03 * STEPS * LR)
    torch.testing.assert_close(head, classifier.detach(), rtol=0, atol=0.03 * STEPS * LR)
    assert "crops every image anew" in caplog.text
    assert "cache_views" not in caplog.text, "advice that this command has no option for"
    assert tuned.weights == sum(parameter.numel() for parameter in norms) + classifier.numel()


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "SigLIP": build_siglip,
    **{name: partial(build_tower, name) for name in ("ResNet", "ConvNeXt", "MobileCLIP-B", "CoCa")},
    **{name: partial(build_dual, name) for name in ("ChineseCLIP", "own towers")},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", [tuned_by_clip_lora, tuned_by_two_stages])
def test_every_family_is_tuned_and_left_as_it_was(
    mode: Any, family: str, few: Labelled, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mode ends in a traceback with some base, or leaves it changed for the modes after it."""
    model = FAMILIES[family]()
    size = getattr(getattr(model, "visual", None), "image_size", None) or (32, 32)
    size = size if isinstance(size, tuple) else (size, size)

    def whole(image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image.resize(size))).permute(2, 0, 1).float() / 255

    monkeypatch.setattr(towers, "crop_and_flip", lambda preprocess: preprocess)
    clip = replace(as_clip(model), tokenizer=Letters(), preprocess=whole)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with mode(clip, job) as tuned:
        assert not all(map(torch.equal, clip.model.state_dict().values(), before.values()))
        assert 0 <= tuned.accuracy(OnClasses(few, PROMPTS)) <= 1
    after = clip.model.state_dict()
    assert after.keys() == before.keys()
    assert [name for name in before if not torch.equal(after[name], before[name])] == []


def test_a_stopped_training_ends_with_the_same_bits(
    make_clip: Callable[[], Clip], job: Job, few: Labelled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A comparison that was interrupted within a cell ends with another accuracy than one that was not."""
    monkeypatch.setattr(towers, "_CHECKPOINT", 2)
    whole, stopped = make_clip(), make_clip()

    def learnt(clip: Clip) -> list[Tensor]:
        return [
            w.detach().clone() for layer in require_lora(clip).layers.values() for w in layer.parameters()
        ]

    with tuned_by_clip_lora(whole, replace(job, folder=tmp_path / "whole")) as tuned:
        wanted = learnt(whole)
        accuracy = tuned.accuracy(OnClasses(few, PROMPTS))
    step = Loop.step

    def dying(self: Loop, batch: Any, number: int) -> Any:
        if number == 4:
            raise KeyboardInterrupt
        return step(self, batch, number)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "step", dying)
        with pytest.raises(KeyboardInterrupt), tuned_by_clip_lora(stopped, job):
            pass
    with tuned_by_clip_lora(stopped, job) as tuned:
        assert all(map(torch.equal, learnt(stopped), wanted))
        assert tuned.accuracy(OnClasses(few, PROMPTS)) == accuracy


def test_crops_are_of_the_published_sizes() -> None:
    """Crops or flips are others than the papers', or not drawn from torch's random numbers."""
    picture = Image.fromarray(np.arange(40 * 60, dtype=np.uint32).reshape(40, 60).astype(np.uint8)).convert(
        "RGB"
    )
    crop = CropAndFlip((8, 8), "bicubic", (0.5,) * 3, (0.25,) * 3)
    torch.manual_seed(0)
    first, second = crop(picture), crop(picture)
    torch.manual_seed(0)
    assert torch.equal(crop(picture), first)
    assert not torch.equal(first, second)
    from torchvision import transforms as steps

    torch.manual_seed(5)
    part = steps.RandomResizedCrop(8, (0.08, 1), interpolation=steps.InterpolationMode.BICUBIC)(picture)
    part = steps.RandomHorizontalFlip(0.5)(part)
    wanted = steps.Normalize([0.5] * 3, [0.25] * 3)(steps.ToTensor()(part))
    torch.manual_seed(5)
    torch.testing.assert_close(crop(picture), wanted)
