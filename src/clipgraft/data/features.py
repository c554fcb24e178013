"""Features of many images or captions, in order, each computed once."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgraft.data.feature_cache import FeatureCache
from clipgraft.data.feature_key import UnknownError, image_key, vision_lora_is_active
from clipgraft.data.loading import Transform, image_batches
from clipgraft.data.preprocessing import fast_preprocess
from clipgraft.data.stored_rows import StoredRows, computed_rows
from clipgraft.engine.encoder import Encoder
from clipgraft.errors import DataError
from clipgraft.models.clip import Clip
from clipgraft.models.device import use_autocast
from clipgraft.progress import Progress, counting, showing

log = logging.getLogger("clipgraft")


def encode_images(
    clip: Clip,
    paths: Sequence[Path],
    *,
    batch_size: int = 64,
    workers: int = 2,
    autocast: bool | None = False,
    encoder: Encoder | None = None,
    progress: Progress = None,
    cache: FeatureCache | None = None,
    transform: Transform | None = None,
    exact_preprocess: bool = False,
    label: str = "image features",
) -> Tensor:
    """Unit-norm fp32 features of image files, (N, D) on the CPU, in the order of `paths`.

    The model runs in eval mode and is left in the mode it was in. `progress` is None for a bar in terminals
    and notebooks, True for one anywhere, False for none, or a function of (done, of how many). With a
    `cache`, only images it does not hold are encoded, unless LoRA acts on the image tower; `label` names them
    where it says so. `autocast` computes in bf16, with None where the device is fast at it; `encoder` takes
    the place of a new one with it.

    `transform` takes the place of the model's own preprocessing. Either runs in its faster form where
    `clipgraft.data.preprocessing` has one, which states how close that is; not with `exact_preprocess`.

    Raises:
        DataError: there is no image, or one that cannot be used.
        ModelError: the model came without preprocessing.
    """

    encoder = encoder or Encoder(clip, use_autocast(autocast, clip.device))

    def forward(pixels: Tensor) -> Tensor:
        return F.normalize(encoder.encode_image(pixels), dim=-1)

    if cache is not None and vision_lora_is_active(clip):
        log.info("%s: features are not cached, the image tower carries LoRA", label)
        cache = None
    with showing(progress, label) as told:
        return image_rows(
            clip,
            paths,
            forward,
            batch_size=batch_size,
            workers=workers,
            autocast=encoder.autocast,
            progress=counting(told, len(paths)),
            cache=cache,
            transform=transform,
            exact_preprocess=exact_preprocess,
            label=label,
        ).tensor()


def image_steps(clip: Clip, transform: Transform | None = None, exact_preprocess: bool = False) -> Transform:
    """The deterministic preprocessing of `transform` or the model, in its faster form where there is one."""
    steps = transform or clip.require_preprocess()
    return steps if exact_preprocess else fast_preprocess(steps) or steps


def image_rows(
    clip: Clip,
    paths: Sequence[Path],
    forward: Callable[[Tensor], Tensor],
    *,
    stored: str = "image features",
    dtype: torch.dtype = torch.float32,
    item_shape: tuple[int, ...] | None = None,
    batch_size: int = 64,
    workers: int = 2,
    autocast: bool = False,
    progress: Callable[[int], None] | None = None,
    cache: FeatureCache | None = None,
    transform: Transform | None = None,
    exact_preprocess: bool = False,
    shortest: int | None = None,
    label: str = "image features",
) -> StoredRows:
    """What a frozen part of the image tower gives for image files, (N, *item), one row each, in order.

    `forward` maps pixels (n, 3, H, W) to (n, *item) and runs in eval mode without gradients. With a `cache`,
    `stored` must name what it computes, and no adapter may act on the way; rows stay on disk until they are
    asked for. `dtype` is what rows are kept in. `progress` is told how many images each batch added. The
    other arguments are those of `encode_images`, of `image_batches` (`shortest`) and of
    `FeatureCache.get_or_compute` (`item_shape`).
    """
    if not paths:
        raise DataError("there is no image to encode; give at least one")
    steps = image_steps(clip, transform, exact_preprocess)

    def compute(missing: Sequence[Path], add: Callable[[Tensor], None]) -> None:
        with evaluating(clip), torch.inference_mode():
            for indices, pixels in image_batches(
                missing, steps, batch_size=batch_size, workers=workers, shortest=shortest
            ):
                add(forward(pixels))
                if progress is not None:
                    progress(len(indices))

    if cache is not None:
        try:
            key = image_key(clip, steps, stored=stored, dtype=dtype, autocast=autocast, shortest=shortest)
        except UnknownError as reason:
            log.info("%s: features are not cached, the preprocessing holds %s", label, reason)
        else:
            return cache.get_or_compute(
                key, paths, compute, label=label, item_shape=item_shape, progress=progress
            )
    return computed_rows(paths, compute, dtype)


def encode_captions(
    clip: Clip,
    captions: Sequence[str],
    *,
    batch_size: int = 256,
    autocast: bool | None = False,
    encoder: Encoder | None = None,
) -> Tensor:
    """Unit-norm fp32 features of captions, (N, D) on the CPU, in order.

    Equal captions are encoded once and the rest in order of length. `autocast` and `encoder` are as in
    `encode_images`.

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
    encoder = encoder or Encoder(clip, use_autocast(autocast, clip.device))
    encoded: Tensor | None = None
    with evaluating(clip), torch.inference_mode():
        for rows in torch.split(order, batch_size):
            part = F.normalize(encoder.encode_text(tokens[rows]), dim=-1).cpu()
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
