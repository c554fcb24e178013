"""Write folders of images to encode, and read encoded folders without clipgraft."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image

from clipgraft.data.features import image_steps
from clipgraft.models.clip import Clip
from clipgraft.pictures import open_image

MakeAdapter = Callable[[str, str], Path]
GOOD = 21
BAD = {"a/broken.jpg", "b/empty.png"}


def write_picture(path: Path, seed: int) -> Path:
    """Write a noise image; its size depends on the seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed)
    pixels = noise.integers(0, 255, (40 + seed % 5, 36 + seed % 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write_tree(root: Path) -> Path:
    """Write 21 images in three folders, one damaged and one empty image, and files that are not images."""
    for number in range(GOOD):
        folder = ("", "a", "b/c")[number % 3]
        write_picture(root / folder / f"{number:02d}.{('png', 'jpg')[number % 2]}", number)
    whole = (root / "a" / "01.jpg").read_bytes()
    (root / "a" / "broken.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "b" / "empty.png").write_bytes(b"")
    (root / "notes.txt").write_text("no image")
    (root / ".hidden").mkdir()
    (root / ".hidden" / "x.png").write_bytes(b"")
    return root


def tree_bytes(out: Path) -> dict[str, bytes]:
    """Read every file of an encoded folder except the lock, by relative path."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def read_encoded(out: Path, kind: str = "img_emb", key: str = "path") -> dict[str, npt.NDArray[Any]]:
    """Read vectors by path as any user of clip-retrieval's layout would: files are paired by their number."""
    found: dict[str, npt.NDArray[Any]] = {}
    for file in sorted((out / kind).glob("*.npy")):
        number = file.stem.rsplit("_", 1)[1]
        names = pq.read_table(out / "metadata" / f"metadata_{number}.parquet").column(key).to_pylist()
        vectors = np.load(file)
        assert len(names) == len(vectors)
        assert not set(names) & set(found)
        found.update(zip(names, vectors, strict=True))
    return found


def read_errors(out: Path) -> dict[str, str]:
    """Read `errors.parquet`: the reason for each path."""
    table = pq.read_table(out / "errors.parquet")
    return dict(zip(table.column("path").to_pylist(), table.column("reason").to_pylist(), strict=True))


def vectors_one_by_one(clip: Clip, root: Path, keys: list[str]) -> npt.NDArray[Any]:
    """Encode images one by one with `clip.encode_image`: the reference for `encode_folder`."""
    steps = image_steps(clip)
    with torch.inference_mode():
        rows = [clip.encode_image(steps(open_image(root / key))[None])[0] for key in keys]
    vectors: npt.NDArray[Any] = F.normalize(torch.stack(rows), dim=-1).numpy()
    return vectors
