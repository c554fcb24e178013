"""What clients ask for: captions and photographs, each another one, in a dialect that both servers speak."""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Sequence

import numpy as np
from PIL import Image

from benchmarks.serve.load import request

_WORDS = (
    "a the red green small old photo of with on in dog cat car tree house street child ball bowl of soup "
    "running sleeping beside under bright morning table window mountain river bridge bird boat kitchen"
)
_SIZE = (640, 480)


def captions(count: int, seed: int = 0) -> list[str]:
    """Captions of 5 to 15 words, of which nearly all differ."""
    draw, words = random.Random(seed), _WORDS.split()
    return [" ".join(draw.choices(words, k=draw.randint(5, 15))) for _ in range(count)]


def photographs(count: int, seed: int = 0) -> list[bytes]:
    """JPEG files of 640x480 with the smooth content and the size (about 50 kB) of photographs."""
    draw = np.random.default_rng(seed)
    files = []
    for _ in range(count):
        coarse = draw.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        picture = np.asarray(Image.fromarray(coarse).resize(_SIZE, Image.Resampling.BICUBIC)).astype(int)
        noisy = np.clip(picture + draw.normal(0, 6, picture.shape), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noisy).save(buffer, format="JPEG", quality=85)
        files.append(buffer.getvalue())
    return files


def text_requests(path: str, models: Sequence[str], texts: Sequence[str]) -> list[bytes]:
    """One text a request, of the model of the same number."""
    bodies = [{"model": model, "input": [text]} for model, text in zip(models, texts, strict=True)]
    return [request(path, json.dumps(body).encode()) for body in bodies]


def image_requests(path: str, models: Sequence[str], files: Sequence[bytes]) -> list[bytes]:
    """One image a request as a data URI, as infinity and clipgraft take it."""
    requests = []
    for model, content in zip(models, files, strict=True):
        uri = f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"
        body = {"model": model, "input": [uri], "modality": "image"}
        requests.append(request(path, json.dumps(body).encode()))
    return requests


def zipf_names(names: Sequence[str], count: int, seed: int = 0) -> list[str]:
    """Names drawn so that the n-th is asked for with a weight of 1/n."""
    weights = [1 / (number + 1) for number in range(len(names))]
    return random.Random(seed).choices(list(names), weights, k=count)
