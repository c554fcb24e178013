"""Features of many images or captions, in order, each computed once."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgraft.data.args import FeatureArgs
from clipgraft.data.feature_cache import FeatureCache, open_cache
from clipgraft.data.feature_key import UnknownError, image_key, vision_lora_is_active
from clipgraft.data.loading import Transform, image_batches
from clipgraft.data.preprocessing import fast_preprocess
from clipgraft.data.stored_rows import FEATURES, RowKind, StoredRows, computed_rows
from clipgraft.engine.encoder import Encoder
from clipgraft.errors import DataError
from clipgraft.models.clip import Clip
from clipgraft.models.device import use_autocast
from clipgraft.progress import Progress, counting, showing

log = logging.getLogger("clipgraft")


def encode_images(
    clip: Clip,
    paths: Sequence[Path],
    features: FeatureArgs | None = None,
    *,
    batch_size: int = 64,
    encoder: Encoder | None = None,
    transform: Transform | None = None,
    cache: FeatureCache | None = None,
    label: str = "image features",
    progress: Progress = None,
    **options: Any,
) -> Tensor:
    """Encode image files to unit-norm fp32 features, (N, D) on the CPU, in the order of `paths`.

    The model runs in eval mode and is left in the mode it was in. With a feature cache, only images it does
    not hold are encoded, unless LoRA acts on the image tower.

    Args:
        clip: the model.
        paths: image files, at least one.
        features: how images become features, and where features are kept.
        batch_size: images encoded at once.
        encoder: takes the place of a new one.
        transform: takes the place of the model's own preprocessing. Either runs in its faster form where
            `clipgraft.data.preprocessing` has one, which states how close that is, unless `exact_preprocess`.
        cache: an open feature cache, in place of the one that `features` names.
        label: names the images in log lines and on the progress bar.
        progress: None shows a bar in terminals and notebooks, True always, False never; or a function of
            (done, of how many).
        **options: single fields of `FeatureArgs`, such as `workers=0`, in place of those of `features`.

    Raises:
        DataError: there is no image, or one that cannot be used, or that a table of features lacks.
        ModelError: the model came without preprocessing.
    """
    table = clip.table("vision")
    if table is not None:
        if transform is not None:
            raise DataError(f"{label}: the images are a table of features, which has no other views of them")
        return table.look_up(paths).cpu()
    features = (features or FeatureArgs()).replace(**options)
    encoder = encoder or Encoder(clip, use_autocast(features.autocast, clip.device))

    def forward(pixels: Tensor) -> Tensor:
        return F.normalize(encoder.encode_image(pixels), dim=-1)

    cache = cache or open_cache(features)
    if cache is not None and vision_lora_is_active(clip):
        log.info("%s: features are not cached, the image tower carries LoRA", label)
        cache = None
    with showing(progress, label) as told:
        return image_rows(
            clip,
            paths,
            forward,
            features.replace(autocast=encoder.autocast),
            batch_size=batch_size,
            progress=counting(told, len(paths)),
            cache=cache,
            transform=transform,
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
    features: FeatureArgs,
    kind: RowKind = FEATURES,
    *,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
    cache: FeatureCache | None = None,
    transform: Transform | None = None,
    label: str = "image features",
) -> StoredRows:
    """Compute what a frozen part of the image tower gives for image files, (N, *item), one row each.

    `forward` maps pixels (n, 3, H, W) to (n, *item) and runs in eval mode without gradients, in the precision
    that `features.autocast` says. With a `cache`, `kind` must name what it computes, and no adapter may act
    on the way; rows stay on disk until they are asked for. `progress` is told how many images each batch
    added. The other arguments are those of `encode_images`.
    """
    if not paths:
        raise DataError("there is no image to encode; give at least one")
    steps = image_steps(clip, transform, features.exact_preprocess)

    def compute(missing: Sequence[Path], add: Callable[[Tensor], None]) -> None:
        with evaluating(clip), torch.inference_mode():
            for indices, pixels in image_batches(
                missing, steps, batch_size=batch_size, workers=features.workers
            ):
                add(forward(pixels))
                if progress is not None:
                    progress(len(indices))

    if cache is not None:
        try:
            key = image_key(clip, steps, kind, autocast=features.autocast is True)
        except UnknownError as reason:
            log.info("%s: features are not cached: preprocessing or tower hold %s", label, reason)
        else:
            return cache.get_or_compute(
                key, paths, compute, label=label, item_shape=kind.shape, progress=progress
            )
    return computed_rows(paths, compute, kind.dtype)


def encode_captions(
    clip: Clip,
    captions: Sequence[str],
    *,
    batch_size: int = 256,
    autocast: bool | None = False,
    encoder: Encoder | None = None,
    tokenize: Callable[[tuple[str, ...]], Tensor] | None = None,
) -> Tensor:
    """Unit-norm fp32 features of captions, (N, D) on the CPU, in order.

    Equal captions are encoded once and the rest in order of length. `autocast` and `encoder` are as in
    `encode_images`; `tokenize` takes the place of the model's own, which it must agree with.

    Raises:
        DataError: there is no caption.
        ModelError: the model came without a tokenizer.
    """
    if not captions:
        raise DataError("there is no caption to encode; give at least one")
    table = clip.table("text")
    if table is not None:
        return table.look_up(captions).cpu()
    distinct = tuple(dict.fromkeys(captions))
    position = {caption: index for index, caption in enumerate(distinct)}
    tokens = (tokenize or clip.tokenize)(distinct)
    ends = clip.family.text_ends(clip.model, tokens)
    order = torch.arange(len(distinct)) if ends is None else ends.argsort(stable=True)
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
