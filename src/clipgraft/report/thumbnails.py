"""Pictures inside the page: small JPEGs as data URIs, each once however often it is shown."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

SIDE = 112
_QUALITY = 76
_BACKGROUND = (255, 255, 255)


@dataclass(frozen=True)
class Thumbnail:
    """A picture of the page: its id there, its size in pixels and its data URI."""

    id: str
    width: int
    height: int
    uri: str


class Thumbnails:
    """Makes thumbnails, and counts the files that no longer give one."""

    def __init__(self) -> None:
        self._by_path: dict[str, Thumbnail | None] = {}
        self._by_content: dict[bytes, Thumbnail] = {}

    def get(self, path: str) -> Thumbnail | None:
        """The thumbnail of a file; None if the file is not there or is no image."""
        if path not in self._by_path:
            self._by_path[path] = self._make(path)
        return self._by_path[path]

    def all(self) -> list[Thumbnail]:
        """Every picture of the page, once."""
        return list(self._by_content.values())

    @property
    def missing(self) -> list[str]:
        """Files that were asked for and gave none."""
        return [path for path, made in self._by_path.items() if made is None]

    def _make(self, path: str) -> Thumbnail | None:
        try:
            with Image.open(Path(path)) as opened:
                picture = ImageOps.exif_transpose(opened).convert("RGBA")
        except (OSError, ValueError, Image.DecompressionBombError):
            return None
        picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        flat = Image.new("RGB", picture.size, _BACKGROUND)
        flat.paste(picture, mask=picture.getchannel("A"))
        buffer = io.BytesIO()
        flat.save(buffer, "JPEG", quality=_QUALITY, optimize=True)
        content = buffer.getvalue()
        if content not in self._by_content:
            uri = f"data:image/jpeg;base64,{base64.b64encode(content).decode('ascii')}"
            number = len(self._by_content) + 1
            self._by_content[content] = Thumbnail(f"picture-{number}", flat.width, flat.height, uri)
        return self._by_content[content]
