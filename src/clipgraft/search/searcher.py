"""Search an encoded folder by text, by image, or by both at once; show what was found as an HTML page."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, SupportsIndex, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgraft.adapters.attach import load_adapter
from clipgraft.adapters.open import load, tell_base
from clipgraft.adapters.peft_openclip import OutProj
from clipgraft.data.features import evaluating, image_steps
from clipgraft.errors import AdapterError, ConfigError, DataError
from clipgraft.files import write_text
from clipgraft.models.clip import Clip, ClipLike, as_clip
from clipgraft.notebook_tables import Picture, Tabled, jpeg_uri, small_pictures
from clipgraft.ours import refuse_foreign
from clipgraft.pictures import ImageError, jpeg_thumbnail, open_image
from clipgraft.readers import reading
from clipgraft.search.archives import read_member
from clipgraft.search.filters import Condition, parse_where
from clipgraft.search.folder import EncodedSet, acting_digest, fitting_set, read_folder
from clipgraft.search.index import open_index
from clipgraft.search.items import IN_TAR, Ref, is_address, read_at
from clipgraft.search.manifest import INDEX_FOLDER, VectorSet
from clipgraft.search.nearest import nearest
from clipgraft.search.store import INSTALL, Array
from clipgraft.shown import shown_line
from clipgraft.text_tables import Column, Table, table_of

log = logging.getLogger("clipgraft")
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


class Hits(Tabled, list[Hit]):
    """What was found, best first: a list of `Hit`, which a notebook shows with small pictures.

    Its data frame has a column for each of the metadata, as `Hit.to_dict` has.
    """

    @overload
    def __getitem__(self, chosen: SupportsIndex) -> Hit: ...

    @overload
    def __getitem__(self, chosen: slice) -> Hits: ...

    def __getitem__(self, chosen: SupportsIndex | slice) -> Hit | Hits:
        """`hits[0]` is a hit, `hits[:3]` are hits."""
        return Hits(super().__getitem__(chosen)) if isinstance(chosen, slice) else super().__getitem__(chosen)

    def table(self) -> Table:
        """Rank, score, path and what else is known of each."""
        rows = [hit.to_dict() for hit in self]
        first = {"rank": Column("rank"), "score": Column("score", _four_digits)}
        names = list(dict.fromkeys((*first, "path", *(name for row in rows for name in row))))
        columns = [first.get(name) or Column(name, left=True) for name in names]
        return table_of("", columns, ([row.get(name) for name in names] for row in rows))

    def pictures(self) -> Mapping[str, Sequence[Picture]]:
        """The images that were found; none of texts."""
        places = [(hit.path, hit.caption or hit.path or "") for hit in self]
        return {"image": small_pictures(places, thumbnail)} if any(hit.path for hit in self) else {}


def _four_digits(score: float) -> str:
    return f"{score:.4f}"


def query(
    folder: str | Path,
    text: str | None = None,
    *,
    image: str | Path | None = None,
    image_weight: float = 0.5,
    k: int = 10,
    where: str | None = None,
    model: ClipLike | None = None,
) -> Hits:
    """Return the k rows of an encoded folder that are most like a text, an image, or both.

    The folder's index is used if it has one that is up to date; otherwise, and with `where`, vectors are
    compared one by one.

    Args:
        folder: what `encode_folder` wrote, or a set in it.
        text, image: what to look for, one or both.
        image_weight: with both: the query is the sum of w·image and (1-w)·text, of unit length each.
        k: most results.
        where: conditions on metadata (`clipgraft.search.filters`); only rows that meet them are compared.
        model: the base that encoded the folder; an adapter that acts on it changes the query. One that
            changes the tower that made the vectors must have made them; any other fits. None loads what the
            folder names (`load_model`), anew at every call.

    Raises:
        ConfigError: nothing to look for, a weight outside 0..1, or conditions that cannot be read.
        DataError: nothing is encoded there, or the image cannot be used.
        ModelError, AdapterError: another base or adapter made the vectors.
    """
    if text is None and image is None:
        raise ConfigError("nothing to search for: give a text, an image, or both")
    if not isinstance(text, str | None):
        raise ConfigError(f"`text`: got a {type(text).__name__}, allowed is one text; ask once for each")
    if not 0 <= image_weight <= 1:
        raise ConfigError(f"`image_weight`: got {image_weight:g}, allowed is 0 to 1")
    if k < 1:
        raise ConfigError(f"`k`: got {k}, allowed is 1 or more")
    conditions = parse_where(where) if where is not None else ()
    clip = load_model(folder) if model is None else as_clip(model)
    encoded = fitting_set(folder, clip)
    vector = query_vector(clip, text, image, image_weight).cpu().numpy()[None]
    index = None if conditions else open_index(encoded)
    return Hits(hit for _, hit in find_hits(encoded, index, vector, k, conditions))


def load_model(
    folder: str | Path,
    adapter: str | Path | None = None,
    *,
    model: str | None = None,
    pretrained: str | None = None,
    device: str | torch.device = "cpu",
    force: bool = False,
    peft_out_proj: OutProj | None = None,
) -> Clip:
    """Load the base that encoded a folder, with an adapter.

    Args:
        folder: what `encode_folder` wrote, or a set in it.
        adapter: a folder, or the name that it was encoded under; None is the one that made the vectors, if
            any did.
        model, pretrained: the base, where it is no longer what the folder names.
        device: to load to.
        force: load an adapter that was made for another base.
        peft_out_proj: as in `load_adapter`.

    Raises:
        ConfigError: the folder does not name its base.
        DataError: nothing is encoded there.
        AdapterError: there is no such adapter, or there are several to choose from.
    """
    _, manifest, part = read_folder(folder)
    origin = manifest.origin
    name, weights = (origin.name, origin.pretrained or None) if model is None else (model, pretrained)
    if not name:
        raise ConfigError(f"{folder} does not name its base: give `model` and `pretrained`")
    if model is None:
        tell_base(name, weights, f"the encoded folder {folder}")
    clip = load(name, weights, device=device)
    known = {note.name: note.path for note in manifest.adapters if note.path}
    if adapter is None:
        sets = [part] if part else manifest.sets
        if any(each.digest is None for each in sets):
            return clip
        adapter = _only_adapter(folder, sets, known)
    path = Path(known.get(str(adapter), adapter))
    if not path.exists():
        names = f" (names known here: {', '.join(known)})" if known else ""
        raise AdapterError(f"`adapter` {adapter}: there is no adapter at {path}{names}; give its folder")
    load_adapter(clip, path, force=force, peft_out_proj=peft_out_proj)
    log.info("adapter %s from %s", adapter, path)
    if acting_digest(clip, origin.tower) is None:
        tower, other = ("image", "text") if origin.kind == "images" else ("text", "image")
        log.info("it acts on the %s tower alone: the base's %s vectors are searched", other, tower)
    return clip


def _only_adapter(folder: str | Path, sets: Sequence[VectorSet], known: Mapping[str, str]) -> str:
    """Return the adapter that made all vectors; raises AdapterError if several did or its path is unknown."""
    names = [str(each.adapter) for each in sets]
    if len(names) > 1:
        raise AdapterError(
            f"{folder}: holds vectors of several adapters: choose one with `adapter`: {', '.join(names)}"
        )
    if names[0] not in known:
        raise AdapterError(f"{folder}: was encoded with adapter {names[0]}: give its folder with `adapter`")
    return names[0]


def query_vector(clip: Clip, text: str | None, image: str | Path | None, image_weight: float = 0.5) -> Tensor:
    """Encode a text, an image, or their weighted sum as a unit-norm fp32 vector (D,)."""
    parts: list[Tensor] = []
    weights = [1.0] if text is None or image is None else [1 - image_weight, image_weight]
    with evaluating(clip), torch.inference_mode():
        if text is not None:
            parts.append(clip.encode_text(text, normalize=True)[0])
        if image is not None:
            steps = image_steps(clip)
            pixels = steps(open_image(Path(image)))
            parts.append(clip.encode_image(pixels[None], normalize=True)[0])
        total = sum((weight * part for weight, part in zip(weights, parts, strict=True)), torch.zeros(()))
        return F.normalize(total.float(), dim=-1)


def find_hits(
    encoded: EncodedSet, index: Any | None, query: Array, k: int, conditions: Sequence[Condition]
) -> list[tuple[int, Hit]]:
    """Return the rows nearest to one query, (1, D), best first: their numbers and what is known of them.

    `index` is what `open_index` gave; it is not used with conditions.
    """
    scores, rows = _nearest(encoded, index, query, k, conditions)
    hits = []
    numbered = zip(scores[0], rows[0].tolist(), encoded.rows(rows[0]), strict=True)
    for rank, (score, row, metadata) in enumerate(numbered, 1):
        hit = Hit(rank, float(score), encoded.place_of(metadata), metadata["caption"], metadata)
        hits.append((row, hit))
    return hits


def _nearest(
    encoded: EncodedSet, index: Any | None, query: Array, k: int, conditions: Sequence[Condition]
) -> tuple[Array, Array]:
    if index is None or conditions:
        return nearest(encoded, query, k, conditions)
    with reading(encoded.place / INDEX_FOLDER, DataError, "run `clipgraft index` again"):
        scores, rows = index.search(query, min(k, encoded.manifest.rows))
    if rows.max(initial=-1) >= encoded.manifest.rows:  # the file may be a stranger's
        raise DataError(
            f"{encoded.place}: its index names rows that are not there; run `clipgraft index` again"
        )
    found = rows[0] >= 0  # FAISS fills up with -1 where an approximate index finds fewer
    return scores[:, found], rows[:, found]


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
        content = thumbnail(place, _SIDE)
    except ImageError as error:
        return None, error.reason
    return jpeg_uri(content), None


def thumbnail(place: str, side: int) -> bytes:
    """Return the image at a path, address or in a tar file as a JPEG of at most `side` pixels each way.

    Raises:
        ImageError: it cannot be opened, with the reason in a few words.
    """
    try:
        return jpeg_thumbnail(_content(place), side)
    except ImageError:
        raise
    # What a file system at an address raises is its own business; the reason is told in the image's place.
    except Exception as error:
        raise ImageError(place, " ".join(str(error).split()) or type(error).__name__) from error


def _content(place: str) -> bytes | Path:
    if IN_TAR in place and not is_address(place) and not os.path.exists(place):  # noqa: PTH110
        return read_member(place)
    return read_at(Ref(place)) if is_address(place) else Path(place)
