"""The fast preprocessing: the picture that the model's own transform makes, within the stated tolerance."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
from torchvision import transforms as T
from transformers import CLIPImageProcessor

from clipgraft.data.loading import image_batches
from clipgraft.data.preprocessing import DECODE_FACTOR, fast_preprocess
from clipgraft.models.processors import HfPreprocess
from clipgraft.pictures import open_image


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Blurred noise with hard edges: detail at every scale, as in a photograph."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for cells in (3, 9, 27, 81):
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += (
            np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=float) / cells**0.5
        )
    total = 255 * (total - total.min()) / np.ptp(total)
    total[: height // 3, : width // 4] = (230, 20, 40)
    return Image.fromarray(total.astype(np.uint8))


def jpeg(image: Image.Image) -> bytes:
    """The image at quality 90."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def openclip(size: int = 32, **settings: Any) -> Any:
    """open_clip's transform for evaluation."""
    return image_transform_v2(PreprocessCfg(size=(size, size), **settings), is_train=False)


def hf(size: int = 32, **settings: Any) -> HfPreprocess:
    """transformers' image processor as a transform."""
    return HfPreprocess(CLIPImageProcessor(size={"shortest_edge": size}, crop_size=size, **settings))


def levels(one: Tensor, other: Tensor, std: tuple[float, ...]) -> Tensor:
    """Differences in grey levels of 255."""
    assert one.shape == other.shape
    assert one.dtype == other.dtype == torch.float32
    return (255 * torch.tensor(std)[:, None, None] * (one - other)).abs()


@pytest.mark.parametrize(
    "transform",
    [openclip(), openclip(resize_mode="squash"), openclip(interpolation="bilinear"), hf(), hf(resample=2)],
    ids=["open_clip", "squash", "bilinear", "transformers", "transformers bilinear"],
)
@given(width=st.integers(20, 140), height=st.integers(20, 140))
@settings(max_examples=25)
def test_every_size_is_the_transforms_own(transform: Any, width: int, height: int) -> None:
    """Images would be cut a pixel off, or blurred, and match no feature made elsewhere."""
    fast = fast_preprocess(transform)
    assert fast is not None
    image = photo(width, height)
    off = levels(fast(image), transform(image), fast.std)
    assert off.max() < 2.01
    assert off.mean() < 0.5


@pytest.mark.parametrize("transform", [openclip(), hf()], ids=["open_clip", "transformers"])
@pytest.mark.parametrize("size", [(64, 64), (130, 96), (256, 200), (520, 300)])
def test_reduced_decoding_stays_within_the_tolerance(transform: Any, size: tuple[int, int]) -> None:
    """Features of large photos would not be those of the model's own preprocessing."""
    fast = fast_preprocess(transform)
    assert fast is not None
    file = jpeg(photo(*size))
    small = open_image(file, shortest=fast.shortest)
    assert min(small.size) >= min(DECODE_FACTOR * 32, *size)
    assert levels(fast(small), transform(open_image(file)), fast.std).mean() < 1


def test_the_decode_size_follows_the_resize() -> None:
    """A model of 336 pixels would get pictures decoded for one of 224."""
    for transform in (openclip(336), hf(336)):
        fast = fast_preprocess(transform)
        assert fast is not None
        assert fast.shortest == DECODE_FACTOR * 336


@pytest.mark.parametrize(
    "transform",
    [
        openclip(resize_mode="longest"),
        hf(do_normalize=False),
        hf(resample=0),
        HfPreprocess(CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=40)),
        T.Compose([T.Resize(32), T.ToTensor()]),
        T.Compose([T.Resize(32), T.Grayscale(3), T.ToTensor(), T.Normalize([0.5] * 3, [0.5] * 3)]),
        T.Compose([T.Resize(32), T.Resize(16), T.ToTensor(), T.Normalize([0.5] * 3, [0.5] * 3)]),
        T.Compose([T.CenterCrop(40), T.Resize(32), T.ToTensor(), T.Normalize([0.5] * 3, [0.5] * 3)]),
        T.Compose([T.Resize(32, max_size=64), T.ToTensor(), T.Normalize([0.5] * 3, [0.5] * 3)]),
        image_transform_v2(PreprocessCfg(size=(32, 32)), is_train=True),
        torch.nn.Identity(),
    ],
)
def test_other_transforms_are_left_alone(transform: Any) -> None:
    """A step that is not known would be dropped without a word."""
    assert fast_preprocess(transform) is None


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_the_same_pictures(tmp_path: Path, workers: int) -> None:
    """Batches normalised in the main process would differ from single images."""
    files = [tmp_path / f"{seed}.jpg" for seed in range(5)]
    for seed, file in enumerate(files):
        file.write_bytes(jpeg(photo(150, 100, seed)))
    fast = fast_preprocess(openclip(16))
    assert fast is not None
    batches = list(image_batches(files, fast, batch_size=2, workers=workers))
    assert [len(ids) for ids, _ in batches] == [2, 2, 1]
    single = torch.stack([fast(open_image(file, shortest=fast.shortest)) for file in files])
    assert torch.equal(torch.cat([pixels for _, pixels in batches]), single)
    assert single.dtype == torch.float32
