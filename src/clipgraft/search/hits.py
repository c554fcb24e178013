"""Results of a search, and a self-contained HTML page of them."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from clipgraft.errors import DataError
from clipgraft.files import write_text
from clipgraft.ours import refuse_foreign
from clipgraft.pictures import ImageError, open_image
from clipgraft.search.archives import read_member
from clipgraft.search.items import IN_TAR, Ref, is_address, read_at
from clipgraft.search.store import INSTALL
from clipgraft.shown import shown_line

_SIDE = 240  # pixels of a thumbnail


@dataclass(frozen=True)
class Hit:
    """One result.

    Attributes:
        rank: from 1.
        score: cosine of query and vector.
        path: of an image: where it was encoded, or is now if the source moved; None for a text.
        caption: of the image where its source had one; the text itself.
        metadata: the whole row of metadata.
    """

    rank: int
    score: float
    path: str | None
    caption: str | None
    metadata: dict[str, Any]

    def __repr__(self) -> str:
        words = "" if self.caption is None else f" {shown_line(self.caption)[:60]!r}"
        return f"Hit({self.rank}, {self.score:.4f}, {self.path}{words})"

    def to_dict(self) -> dict[str, Any]:
        """Return one flat row, as for a DataFrame: rank, score, path, and the columns of the metadata."""
        return {**self.metadata, "rank": self.rank, "score": self.score, "path": self.path}


def write_page(
    path: Path,
    title: str,
    hits: Sequence[Hit],
    query_image: Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a page of thumbnails; the reason stands in the place of an image that cannot be opened.

    Raises DataError where jinja2 is not installed, or `path` is no page of ours and not to be overwritten.
    """
    refuse_foreign(path, overwrite, DataError, "`html`")
    try:
        import jinja2
    except ImportError as error:
        raise DataError(f"`html` needs jinja2: {INSTALL}") from error
    source = (files("clipgraft.search") / "hits.html.j2").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)
    cells = [(hit, *_picture(hit.path)) for hit in hits]
    query, _ = _picture(None if query_image is None else str(query_image))
    write_text(path, template.render(title=title, cells=cells, query=query))
    return path


def _picture(place: str | None) -> tuple[str | None, str | None]:
    """Return a thumbnail as a data URI, or the reason why there is none; neither for a text."""
    if place is None:
        return None, None
    try:
        image = ImageOps.contain(open_image(_content(place), shortest=_SIDE), (_SIDE, _SIDE))
    except ImageError as error:
        return None, error.reason
    # What a file system at an address raises is its own business; the reason is shown in the image's place.
    except Exception as error:
        return None, " ".join(str(error).split()) or type(error).__name__
    return _data_uri(image), None


def _content(place: str) -> bytes | Path:
    if IN_TAR in place and not is_address(place) and not os.path.exists(place):  # noqa: PTH110
        return read_member(place)
    return read_at(Ref(place)) if is_address(place) else Path(place)


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
