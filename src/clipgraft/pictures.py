"""Open one image file as RGB, or say in a few words why it cannot be used.

Everything that feeds pixels to a model goes through `open_image`, so that a photo looks the same whether it
is trained on, encoded or searched for. Pillow is left to do the decoding; what is decided here is what Pillow
leaves to its caller: orientation, transparency, deep greyscale, the size limit, and that no warning reaches
the user.
"""

from __future__ import annotations

import io
import os
import re
import struct
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tarfile import TarError
from threading import Lock
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from clipgraft.errors import DataError
from clipgraft.readers import POINTER, is_pointer
from clipgraft.stored_images import image_bytes, read_stored

MAX_PIXELS = 89_478_485
"""Largest width x height that is decoded: 256 MiB as RGB, the size at which Pillow itself starts to warn."""

HEIC_SUFFIXES = frozenset({".heic", ".heics", ".heif", ".heifs", ".hif"})
HEIC_ADVICE = "pip install 'clipgraft[heic]' to read HEIC photos, or convert them to JPEG"
IMAGE_SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".jfi", ".pjpeg", ".pjp", ".jp2", ".j2k", ".jpx", ".jpf"),
        *(".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".avif", ".tga"),
        *(".ppm", ".pgm", ".pbm", ".pnm"),
        *(HEIC_SUFFIXES if find_spec("pillow_heif") else ()),
    }
)
"""Names of files that are listed as images: what Pillow reads, and HEIC where pillow-heif is installed."""

_ORIENTATION, _SIDEWAYS = ExifTags.Base.Orientation, (5, 6, 7, 8)
_HEIC_BRANDS = frozenset({b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"})
_BLOCK = 256  # images handed to the pool at once: bounds what is in flight when the check stops early


class ImageError(DataError):
    """One image cannot be used. `reason` is short and has no path, so that it fits a table row."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def open_image(source: str | Path | bytes, *, shortest: int | None = None) -> Image.Image:
    """Decode the first frame of an image file, or of its bytes, as an upright 8-bit RGB image.

    EXIF orientation is applied. Transparent pixels are laid over white: their colour is arbitrary (usually
    black), and dropping the alpha channel would put a black object on a black ground. 16-bit greyscale is
    scaled by its full range, where Pillow's own conversion would clip all but the darkest 1/256 to white.

    `shortest` allows a JPEG to be decoded at 1/2, 1/4 or 1/8 of its size as long as no side gets shorter than
    this many pixels: several times faster, for callers that shrink the image anyway.

    Raises ImageError when the file is missing, empty, truncated, damaged, of an unknown format, or larger
    than MAX_PIXELS; the size is read from the header, before any pixel is decoded.
    """
    return open_sized(source, shortest=shortest)[0]


def open_sized(
    source: str | Path | bytes, *, shortest: int | None = None
) -> tuple[Image.Image, tuple[int, int]]:
    """`open_image`, and the upright (width, height) of the whole image, however small it was decoded."""
    name = "<bytes>" if isinstance(source, bytes) else str(source)
    with _QUIET, _reasons(name), _open(name, _content(source)) as image:
        _check_size(name, image)
        width, height = image.size
        if shortest is not None:
            image.draft(None, (shortest, shortest))
        image.load()
        size = (height, width) if _turn_upright(image) else (width, height)
        return _to_rgb(name, image), size


def jpeg_thumbnail(source: str | Path | bytes, side: int) -> bytes:
    """Return an image as a JPEG of at most `side` pixels each way; raises ImageError as `open_image` does."""
    image = ImageOps.contain(open_image(source, shortest=side), (side, side))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    return buffer.getvalue()


def check_image(path: Path, *, decode: bool = True) -> None:
    """Raise ImageError where `open_image` would, at a fraction of its cost.

    Only a full decode shows that a file is cut short or damaged. With `decode=False` the header alone is
    read.
    """
    if decode:
        open_image(path, shortest=1)
        return
    with _QUIET, _reasons(str(path)), _open(str(path), _content(path)) as image:
        _check_size(str(path), image)


def check_images(
    paths: Sequence[Path],
    *,
    decode: bool = True,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Generator[tuple[Path, str | None], None, None]:
    """Yield each path, in order, with the reason why it cannot be used, or None.

    The checks run in `workers` threads (Pillow decodes outside the interpreter lock). `progress(done, total)`
    is called after every image. Stopping the iteration early stops the checks.
    """

    def reason(path: Path) -> str | None:
        try:
            check_image(path, decode=decode)
        except ImageError as error:
            return error.reason
        return None

    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(paths), _BLOCK):
            block = paths[start : start + _BLOCK]
            for done, (path, why) in enumerate(zip(block, pool.map(reason, block), strict=True), start + 1):
                if progress is not None:
                    progress(done, len(paths))
                yield path, why


def _content(source: str | Path | bytes) -> str | Path | bytes:
    """The bytes of an image that lies inside a tar or Parquet file; else the source itself."""
    if isinstance(source, bytes):
        return source
    content = read_stored(source)
    return source if content is None else content


def _open(name: str, source: str | Path | bytes) -> Image.Image:
    """`Image.open`, which learns to read HEIC at the first such file."""
    try:
        return Image.open(_file(source))
    except UnidentifiedImageError:
        if is_pointer(source):
            raise ImageError(name, POINTER) from None
        if not _is_heic(source):
            raise
        if not _read_heic():
            raise ImageError(name, f"is a HEIC photo; {HEIC_ADVICE}") from None
        return Image.open(_file(source))


def _file(source: str | Path | bytes) -> str | Path | io.BytesIO:
    return io.BytesIO(source) if isinstance(source, bytes) else source


def _is_heic(source: str | Path | bytes) -> bool:
    """Whether the content begins as HEIC does; phones also name such files .jpg."""
    if isinstance(source, bytes):
        head = source[:12]
    else:
        with open(source, "rb") as file:  # noqa: PTH123
            head = file.read(12)
    return head[4:8] == b"ftyp" and head[8:12] in _HEIC_BRANDS


@cache
def _read_heic() -> bool:
    """Tell Pillow about HEIC; False where pillow-heif is not installed."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


@contextmanager
def _reasons(name: str) -> Iterator[None]:
    """Turn whatever a decoder raises into an ImageError with a reason that a person can act on."""
    try:
        yield
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(name, "not found") from error
    except UnidentifiedImageError as error:
        raise ImageError(name, _unknown_format(name)) from error
    except Image.DecompressionBombError as error:
        # Pillow refuses twice its own limit while it opens the file, so the size is only in its message.
        count = re.search(r"\d+", str(error))
        raise ImageError(name, _too_large(f"{int(count[0]):,}" if count else "too many")) from error
    except MemoryError as error:
        raise ImageError(name, "does not fit in memory; shrink it") from error
    # Pillow's decoders raise almost any type on damaged bytes (struct.error, IndexError, SyntaxError,
    # zlib.error, ...), and a damaged file is an expected input here: the reason is passed on, never dropped.
    except Exception as error:
        raise ImageError(name, _damage(error)) from error


def _unknown_format(name: str) -> str:
    with suppress(OSError, ValueError, TarError, DataError):  # `<bytes>` is no file's name
        if image_bytes(name) == 0:
            return "the file is empty (0 bytes)"
    return "not an image that Pillow can read; convert it to JPEG or PNG"


def _damage(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, PermissionError | IsADirectoryError):
        return error.strerror or text
    if "truncated" in text.lower():
        return f"the file is cut short ({text}); copy or download it again"
    return f"the file is damaged ({text or type(error).__name__}); copy or download it again"


def _too_large(count: str) -> str:
    return f"{count} pixels, over the limit of {MAX_PIXELS:,}; shrink it"


def _check_size(name: str, image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(name, _too_large(f"{width}x{height} = {width * height:,}"))
    if min(width, height) < 1:
        raise ImageError(name, f"has no pixels ({width}x{height})")


def _turn_upright(image: Image.Image) -> bool:
    """Apply the EXIF orientation; returns whether width and height changed places."""
    # The pixels are decoded and whole by now. A damaged EXIF block only means that no orientation is known.
    try:
        sideways = image.getexif().get(_ORIENTATION) in _SIDEWAYS
        ImageOps.exif_transpose(image, in_place=True)
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, struct.error):
        return False
    return sideways


def _to_rgb(name: str, image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_8_bit(name, np.asarray(image), image.mode)).convert("RGB")
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, "white")
        ground.alpha_composite(image.convert("RGBA"))
        return ground.convert("RGB")
    return image.convert("RGB")


def _to_8_bit(name: str, values: npt.NDArray[Any], mode: str) -> npt.NDArray[np.uint8]:
    """Scale (H, W) deep greyscale to uint8: integers as 16 bits, floats as 0..1 or, failing that, 0..255."""
    low, high = values.min(), values.max()
    top = 65535
    if mode == "F":
        top = 1 if high <= 1 else 255
    if not (low >= 0 and high <= top):
        raise ImageError(
            name, f"grey values from {low:g} to {high:g} do not fit 0..{top}; save it with 8 or 16 bits"
        )
    return np.round(values.astype(np.float64) * (255 / top)).astype(np.uint8)


class _Quiet:
    """Silence Pillow's warnings while any thread is inside.

    `warnings.catch_warnings` swaps process-wide state and is not safe when two threads overlap: the later one
    to leave would bring back the other's filters for good. So the first thread in opens it and the last one
    out closes it.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._inside = 0
        self._filters: warnings.catch_warnings[None] | None = None

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._filters is None:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._filters is not None:
                self._filters.__exit__(kind, error, trace)
                self._filters = None


_QUIET = _Quiet()
