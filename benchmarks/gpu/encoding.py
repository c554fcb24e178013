"""Images a second: from JPEGs, where decoding counts, and from the device's memory, without it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.data import read_table
from benchmarks.environment import usable_cores
from benchmarks.gpu.bench import Bench, Values, compiled, our_clip
from benchmarks.prepare import OPENCLIP_BASE


def ours(bench: Bench, autocast: bool) -> Values:
    from clipgraft.data.features import encode_images

    clip = our_clip(bench)
    return _from_files(
        bench,
        lambda paths: encode_images(
            clip, paths, autocast=autocast, batch_size=bench.batch, workers=usable_cores()
        ).cpu(),
    )


def openclip(bench: Bench, autocast: bool, reference: bool = False) -> Values:
    """Encode as open_clip's documentation shows, with a loader that decodes in every core.

    With `reference` the features become those that all others are compared with.
    """
    from benchmarks.contestants.batches import Photos

    model, preprocess = _openclip_model(bench)

    def run(paths: list[Path]) -> Tensor:
        loader = torch.utils.data.DataLoader(
            Photos([(path, "") for path in paths], preprocess),
            batch_size=bench.batch,
            num_workers=usable_cores(),
            pin_memory=bench.device == "cuda",
        )
        features = []
        with torch.inference_mode(), torch.autocast(bench.device, torch.bfloat16, enabled=autocast):
            for pixels, _ in loader:
                pixels = pixels.to(bench.device, non_blocking=True)
                features.append(F.normalize(model.encode_image(pixels).float(), dim=-1))
        return torch.cat(features).cpu()

    return _from_files(bench, run, reference)


def _from_files(bench: Bench, run: Callable[[list[Path]], Tensor], reference: bool = False) -> Values:
    paths = [path for path, _ in read_table(bench.table)]
    run(paths[: bench.batch])
    bench.reset_peak()
    started = bench.now()
    features = run(paths)
    seconds = bench.now() - started
    if reference:
        torch.save(features, bench.reference)
    return {"images_per_second": len(paths) / seconds, **_cosine(bench, features), **bench.peak()}


def _cosine(bench: Bench, features: Tensor) -> Values:
    expected = torch.load(bench.reference, weights_only=True)
    return {"cosine": F.cosine_similarity(features.float(), expected, dim=-1).min().item()}


def ours_resident(bench: Bench, autocast: bool, compile_it: bool = False) -> Values:
    from clipgraft.engine.encoder import Encoder

    encoder = Encoder(our_clip(bench).eval(), autocast=autocast)
    with torch.inference_mode():
        encoder.encode_image(torch.zeros(1, 3, 224, 224))  # prepares the weights, which is not to be compiled
    encode = compiled(encoder)[1] if compile_it else encoder.encode_image
    return _resident(bench, encode)


def openclip_resident(
    bench: Bench, autocast: bool, compile_it: bool = False, reference: bool = False
) -> Values:
    model, _ = _openclip_model(bench)
    encode = torch.compile(model.encode_image) if compile_it else model.encode_image

    def run(pixels: Tensor) -> Tensor:
        with torch.autocast(bench.device, torch.bfloat16, enabled=autocast):
            features: Tensor = encode(pixels)
            return features

    return _resident(bench, run, reference)


def _resident(bench: Bench, encode: Callable[[Tensor], Tensor], reference: bool = False) -> Values:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(bench.resident, 3, 224, 224, generator=generator).to(bench.device)
    seconds = []
    with torch.inference_mode():
        for _ in range(bench.warmup):
            encode(pixels)
        bench.reset_peak()
        for _ in range(bench.steps):
            started = bench.now()
            features = encode(pixels)
            seconds.append(bench.now() - started)
    features = F.normalize(features.float(), dim=-1).cpu()
    if reference:
        torch.save(features, bench.reference)
    rate = bench.resident / sorted(seconds)[len(seconds) // 2]
    return {"images_per_second": rate, **_cosine(bench, features), **bench.peak()}


def _openclip_model(bench: Bench) -> tuple[Any, Any]:
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms("ViT-B-32", pretrained=str(OPENCLIP_BASE))
    return model.to(bench.device).eval(), preprocess
