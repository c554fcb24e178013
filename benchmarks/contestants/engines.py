"""Image towers in every engine: what makes each, how fast it is, and what it does to features and recall."""

from __future__ import annotations

import copy
import functools
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

import clipgraft as cg
from benchmarks.noise import Watch
from benchmarks.probe import Probe
from clipgraft.data.features import encode_captions
from clipgraft.emoji.scenes import EmojiScenes
from clipgraft.engine.encoder import Encoder
from clipgraft.evaluate.recall_loss import recall_lost
from clipgraft.models.clip import Clip
from clipgraft.models.onnx import _VisionGraph, export_graph

Encode: TypeAlias = Callable[[Tensor], Tensor]
"""(B, 3, H, W) normalised pixels, always as many -> (B, D) features."""

REFERENCE = "torch fp32"
_CALIBRATION = 2  # batches


class World:
    """A model, its pixels, and its graphs, each written when it is first asked for."""

    def __init__(self, clip: Clip, pixels: Tensor, batch: int, threads: int, folder: Path) -> None:
        self.clip, self.pixels, self.batch, self.threads, self.folder = clip, pixels, batch, threads, folder

    @property
    def first(self) -> Tensor:
        return self.pixels[: self.batch]

    @functools.cached_property
    def graph(self) -> Path:
        path = self.folder / "vision.onnx"
        export_graph(_VisionGraph(self.clip), path)
        return path

    @functools.cached_property
    def dynamic_int8(self) -> Path:
        from onnxruntime.quantization import quantize_dynamic

        path = self.folder / "dynamic.onnx"
        quantize_dynamic(self.graph, path, per_channel=True, op_types_to_quantize=["MatMul", "Gemm"])
        return path

    @functools.cached_property
    def static_int8(self) -> Path:
        """Quantised with scales that are measured on the first batches, as OpenVINO reads it."""
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

        parts = iter(torch.split(self.pixels, self.batch)[:_CALIBRATION])

        class Reader(CalibrationDataReader):  # type: ignore[misc]
            def get_next(self) -> dict[str, Any] | None:
                part = next(parts, None)
                return None if part is None else {"pixel_values": part.numpy()}

        path = self.folder / "static.onnx"
        quantize_static(
            self.graph,
            path,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            op_types_to_quantize=["MatMul", "Gemm"],
        )
        return path


def compare(
    model: str, batch: int, images: int, rounds: int, threads: int, seconds: float, compiled: bool
) -> dict[str, Any]:
    """Time all engines on one image tower in interleaved rounds, and compare their features with fp32's.

    `emoji` has trained weights, on whose scenes recall is measured too; other models have random ones. Each
    turn of an engine lasts at least `seconds`.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    logging.disable(logging.WARNING)
    torch.set_num_threads(threads)
    clip = cg.load(model, None if model == "emoji" else "none").eval()
    scenes = EmojiScenes("test", images, 0) if model == "emoji" else None
    if scenes is not None:
        preprocess = clip.require_preprocess()
        pixels = torch.stack([preprocess(scenes.image(index)) for index in range(images)])
    else:
        size = clip.family.image_size(clip.model)
        pixels = torch.randn(images, 3, *size, generator=torch.Generator().manual_seed(0))
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, Probe(threads) as probe, torch.inference_mode():
        engines, absent = _ready(World(clip, pixels, batch, threads, Path(folder)), compiled)
        features = {name: _all(encode, pixels, batch) for name, encode in engines.items()}
        watch = Watch(probe, 0, lambda line: None)
        rates: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
        for _ in range(rounds):
            for name, encode in engines.items():
                turn = functools.partial(_rate, encode, pixels[:batch], seconds)
                rates[name].append(watch.run(f"{model}, {name}", turn))
        for name in engines:
            cosine = F.cosine_similarity(features[name], features[REFERENCE])
            wall, cpu = zip(*rates[name], strict=True)
            found[name] = {
                "rates": wall,
                "cpu_rates": cpu,
                "least": cosine.min().item(),
                "mean": cosine.mean().item(),
            }
        if scenes is not None:
            for name, lost in _recall(clip, scenes, features):
                found[name] |= lost
    return {"engines": found, "absent": absent, "seen": watch.seen}


def _ready(world: World, compiled: bool) -> tuple[dict[str, Encode], dict[str, str]]:
    """Make every engine and run it once; those that cannot are returned with the reason."""
    ready: dict[str, Encode] = {}
    absent: dict[str, str] = {}
    for name, make in ENGINES.items():
        if name.startswith("torch.compile") and not compiled:
            continue
        try:
            encode = make(world)
            encode(world.first)
        except ImportError as error:
            absent[name] = f"{error.name} is not installed"
        # Engines raise what they like; the others are to be measured all the same.
        except Exception as error:
            absent[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        else:
            ready[name] = encode
    return ready, absent


def _all(encode: Encode, pixels: Tensor, batch: int) -> Tensor:
    return torch.cat([encode(part).float() for part in torch.split(pixels, batch)])


def _rate(encode: Encode, pixels: Tensor, seconds: float) -> tuple[float, float]:
    """Images a second, and a second of all cores' time, which other programs on the machine change less."""
    started, worked, done = time.perf_counter(), time.process_time(), 0
    while not done or time.perf_counter() - started < seconds:
        encode(pixels)
        done += len(pixels)
    return done / (time.perf_counter() - started), done / (time.process_time() - worked)


def _recall(
    clip: Clip, scenes: EmojiScenes, features: dict[str, Tensor]
) -> Iterator[tuple[str, dict[str, float]]]:
    captions = [scenes.captions(index)[0] for index in range(len(scenes))]
    texts = encode_captions(clip, captions)
    pairs = cg.Pairs(tuple(Path(f"{i}.png") for i in range(len(scenes))), tuple((c,) for c in captions))
    unit = {name: F.normalize(found, dim=-1) for name, found in features.items()}
    for name, found in unit.items():
        loss = recall_lost((unit[REFERENCE], texts), (found, texts), pairs)
        yield name, {"recall": loss.approximate["text_to_image_R@1"], "points": loss.points}


def _stock(autocast: bool, world: World) -> Encode:
    def encode(pixels: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return world.clip.family.encode_image(world.clip.model, pixels)

    return encode


def _compiled(autocast: bool, world: World) -> Encode:
    # Block by block, as torch advises for models that repeat one: the whole would compile for minutes.
    run: Any = copy.deepcopy(world.clip.model.visual)
    for block in run.transformer.resblocks:
        block.compile(dynamic=False)

    def encode(pixels: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            features: Tensor = run(pixels)
        return features

    return encode


def _ours(autocast: bool, int8: bool, world: World) -> Encode:
    return Encoder(world.clip, autocast, int8=int8).encode_image


def _onnx(graph: str, world: World) -> Encode:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = world.threads
    # Threads that spin after a run would take time from the next engine.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(getattr(world, graph), options, providers=["CPUExecutionProvider"])

    def encode(pixels: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"pixel_values": pixels.numpy()})[0])

    return encode


def _openvino(graph: str, precision: str, world: World) -> Encode:
    import openvino

    core = openvino.Core()
    model = core.read_model(getattr(world, graph))
    model.reshape(list(world.first.shape))
    settings = {"INFERENCE_NUM_THREADS": world.threads, "INFERENCE_PRECISION_HINT": precision}
    request = core.compile_model(model, "CPU", settings).create_infer_request()

    def encode(pixels: Tensor) -> Tensor:
        return torch.from_numpy(request.infer([pixels.numpy()])[0].copy())

    return encode


ENGINES: dict[str, Callable[[World], Encode]] = {
    REFERENCE: functools.partial(_stock, False),
    "torch bf16 autocast": functools.partial(_stock, True),
    "clipgraft fp32": functools.partial(_ours, False, False),
    "clipgraft bf16": functools.partial(_ours, True, False),
    "clipgraft int8": functools.partial(_ours, True, True),
    "torch.compile fp32": functools.partial(_compiled, False),
    "torch.compile bf16": functools.partial(_compiled, True),
    "ONNX Runtime fp32": functools.partial(_onnx, "graph"),
    "ONNX Runtime int8, dynamic": functools.partial(_onnx, "dynamic_int8"),
    "ONNX Runtime int8, static": functools.partial(_onnx, "static_int8"),
    "OpenVINO fp32": functools.partial(_openvino, "graph", "f32"),
    "OpenVINO bf16": functools.partial(_openvino, "graph", "bf16"),
    "OpenVINO int8, static": functools.partial(_openvino, "static_int8", "bf16"),
}
