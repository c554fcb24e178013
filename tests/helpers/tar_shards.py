"""Write the pictures of a table as tar files, by the webdataset library."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import clipgraft as cg


def write_shards(table: Path, folder: Path, shards: int = 2) -> str:
    """Write the pairs of a table as `{0..N}.tar`, captions in `.json`; returns the pattern."""
    import webdataset

    folder.mkdir()
    pairs = list(cg.read_pairs(table))
    size = -(-len(pairs) // shards)
    for shard in range(shards):
        with webdataset.TarWriter(str(folder / f"{shard}.tar")) as writer:
            for image, captions in pairs[shard * size : (shard + 1) * size]:
                content: dict[str, Any] = {"png": image.read_bytes(), "json": {"captions": list(captions)}}
                writer.write({"__key__": image.stem, **content})
    return str(folder / f"{{0..{shards - 1}}}.tar")


def write_tar(path: Path, members: list[tuple[str, bytes | str]]) -> Path:
    """Write a tar file member by member, whatever their names are."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path
