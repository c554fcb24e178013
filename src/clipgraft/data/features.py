"""Features of many images or captions, in order, each computed once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from clipgraft.data.loading import image_batches
from clipgraft.errors import DataError
from clipgraft.models.clip import Clip

Progress = Callable[[int], None]


def encode_images(
    clip: Clip,
    paths: Sequence[Path],
    *,
    batch_size: int = 64,
    workers: int = 2,
    autocast: bool = False,
    progress: Progress | None = None,
) -> Tensor:
    """Unit-norm fp32 features of image files, (N, D) on the CPU, in the order of `paths`.

    The model runs in eval mode and is left in the mode it was in. `progress` is told how many images each
    batch added.

    Raises:
        DataError: there is no image, or one that cannot be used.
        ModelError: the model came without preprocessing.
    """
    if not paths:
        raise DataError("there is no image to encode; give at least one")
    transform = clip.require_preprocess()
    features: list[Tensor] = []
    with evaluating(clip), torch.inference_mode(), _autocast(clip, autocast):
        for indices, pixels in image_batches(paths, transform, batch_size=batch_size, workers=workers):
            features.append(clip.encode_image(pixels, normalize=True).float().cpu())
            if progress is not None:
                progress(len(indices))
    return torch.cat(features).clone()


def encode_captions(
    clip: Clip, captions: Sequence[str], *, batch_size: int = 256, autocast: bool = False
) -> Tensor:
    """Unit-norm fp32 features of captions, (N, D) on the CPU, in order.

    Equal captions are encoded once and the rest in order of length, so that little padding is computed.

    Raises:
        DataError: there is no caption.
        ModelError: the model came without a tokenizer.
    """
    if not captions:
        raise DataError("there is no caption to encode; give at least one")
    distinct = list(dict.fromkeys(captions))
    position = {caption: index for index, caption in enumerate(distinct)}
    tokens = clip.tokenize(distinct)
    ends = clip.family.text_ends(clip.model, tokens.to(clip.device))
    order = torch.arange(len(distinct)) if ends is None else ends.cpu().argsort(stable=True)
    encoded: Tensor | None = None
    with evaluating(clip), torch.inference_mode(), _autocast(clip, autocast):
        for rows in torch.split(order, batch_size):
            part = clip.encode_text(tokens[rows], normalize=True).float().cpu()
            if encoded is None:
                encoded = torch.empty(len(distinct), part.shape[1])
            encoded[rows] = part
    assert encoded is not None
    return encoded[torch.tensor([position[caption] for caption in captions])].clone()


@contextlib.contextmanager
def evaluating(clip: Clip) -> Iterator[Clip]:
    """Run the model in eval mode, then give every module its own mode back."""
    modes = [(module, module.training) for module in clip.model.modules()]
    clip.eval()
    try:
        yield clip
    finally:
        for module, training in modes:
            module.training = training


def _autocast(clip: Clip, enabled: bool) -> torch.autocast:
    return torch.autocast(clip.device.type, torch.bfloat16, enabled=enabled)
