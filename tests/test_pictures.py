"""Image files of every awkward kind: opened as they should look, or refused with a reason."""

from __future__ import annotations

import io
import pickle
import struct
import warnings
import zlib
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Barrier, Event

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from clipgraft.errors import DataError
from clipgraft.pictures import MAX_PIXELS, ImageError, check_image, check_images, open_image

quick = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)


def photo(height: int = 24, width: int = 36) -> np.ndarray:
    """A smooth picture in which no two corners look alike, uint8 (H, W, 3)."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [x * 255 / width, y * 255 / height, (x + y) * 255 / (height + width)]
    return np.stack(planes, axis=-1).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """The bytes of the image as a file of one kind."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, *, bits: int, colour: int, raw: bytes | None) -> bytes:
    """A PNG written without Pillow; without `raw` it has a header and no pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    pixels = b"" if raw is None else chunk(b"IDAT", zlib.compress(raw))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def pixels(source: bytes | Path) -> np.ndarray:
    """What `open_image` makes of it, (H, W, 3)."""
    image = open_image(source)
    assert image.mode == "RGB"
    return np.asarray(image)


# Where the stored picture's (row, column) axes go: https://exiftool.org/TagNames/EXIF.html, tag 0x0112.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(orientation: int, kind: str) -> None:
    """Phone photos would be trained on lying on their side."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(Image.fromarray(photo()), kind, exif=exif, **options)
    np.testing.assert_array_equal(pixels(data), UPRIGHT[orientation](photo()))


def test_jpeg_orientation_survives_reduced_decoding() -> None:
    """A rotated photo decoded at reduced size for speed would come out sideways."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(photo(160, 320)), "JPEG", exif=exif)
    assert open_image(data).size == (160, 320)
    assert open_image(data, shortest=32).size == (40, 80)


@pytest.mark.parametrize("shortest", [1, 30, 50, 100, 200, 400])
def test_reduced_decoding_never_goes_below_the_asked_size(shortest: int) -> None:
    """Features would be computed from an image blown up from too few pixels."""
    data = encoded(Image.fromarray(photo(200, 300)), "JPEG")
    small = open_image(data, shortest=shortest)
    assert min(small.size) >= min(shortest, 200)
    reference = np.asarray(open_image(data).resize(small.size, Image.Resampling.BOX), dtype=float)
    assert np.abs(np.asarray(small, dtype=float) - reference).mean() < 3


def damaged_exif(size: tuple[int, int], damage: bytes) -> bytes:
    """A JPEG of a whole photo whose camera record begins with `damage`."""
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = encoded(Image.fromarray(photo(*size)), "JPEG", exif=exif)
    at = whole.index(b"Exif\0\0") + 6
    return whole[:at] + damage + whole[at + len(damage) :]


ENDLESS_EXIF = (
    b"MM\0*\0\0\0\x08\xff\xff"  # says that it has 65,535 entries; the first, the orientation, is whole
)


@pytest.mark.parametrize(
    "damage", [ENDLESS_EXIF, b"MM\0*\0\0\0\xff", b"XXXX", b"MM\0*\xff\0\0\x08\0\x01\x01\x12\0\x03"]
)
def test_corrupt_exif_does_not_lose_the_picture(damage: bytes) -> None:
    """A photo with a damaged camera record would be dropped, or print warnings in the middle of training."""
    plain = np.asarray(Image.open(io.BytesIO(encoded(Image.fromarray(photo()), "JPEG"))))
    expected = np.rot90(plain, -1) if damage == ENDLESS_EXIF else plain
    np.testing.assert_array_equal(pixels(damaged_exif((24, 36), damage)), expected)


def test_the_corrupt_exif_above_would_warn() -> None:
    """The test above would pass without anything being silenced."""
    with pytest.warns(UserWarning, match="Corrupt EXIF"):
        Image.open(io.BytesIO(damaged_exif((24, 36), ENDLESS_EXIF))).getexif().get(0x0112)


def test_cmyk_jpeg_has_its_colours() -> None:
    """Print-ready photos would come out as negatives."""
    rgb = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0]], dtype=np.uint8)
    cmyk = np.concatenate([255 - rgb, np.zeros((5, 1), np.uint8)], axis=1)
    cmyk[4] = (0, 0, 0, 255)
    blocks = np.repeat(np.repeat(cmyk[None], 16, axis=0), 16, axis=1)
    seen = pixels(encoded(cmyk_image(blocks), "JPEG", quality=100))
    np.testing.assert_allclose(seen[8, 8::16].astype(int), rgb, atol=4)


def cmyk_image(values: np.ndarray) -> Image.Image:
    """A CMYK image from uint8 (H, W, 4)."""
    return Image.frombytes("CMYK", (values.shape[1], values.shape[0]), values.tobytes())


@pytest.mark.parametrize(
    ("kind", "mode"), [("PNG", "I;16"), ("TIFF", "I;16"), ("TIFF", "I;16B"), ("TIFF", "I")]
)
def test_16_bit_grey_is_scaled(kind: str, mode: str) -> None:
    """X-rays stored with 16 bits would be white all over."""
    values = np.linspace(0, 65535, 32 * 40).astype(np.uint16).reshape(32, 40)
    bytes_of = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]
    image = Image.frombytes(mode, (40, 32), values.astype(bytes_of).tobytes())
    expected = np.rint(values / 257).astype(int)
    seen = pixels(encoded(image, kind))
    for channel in range(3):
        np.testing.assert_array_equal(seen[..., channel], expected)


def test_16_bit_colour_keeps_its_high_bytes() -> None:
    """16-bit colour scans would be refused or clipped."""
    deep = np.random.default_rng(0).integers(0, 65536, (6, 5, 3)).astype(">u2")
    raw = b"".join(b"\0" + row.tobytes() for row in deep)
    seen = pixels(png(5, 6, bits=16, colour=2, raw=raw))
    np.testing.assert_allclose(seen, deep / 257, atol=1)


@pytest.mark.parametrize("top", [1.0, 255.0])
def test_float_tiff_is_scaled(top: float) -> None:
    """Images saved as floats would be black."""
    values = np.linspace(0, top, 20 * 20, dtype=np.float32).reshape(20, 20)
    seen = pixels(encoded(Image.fromarray(values), "TIFF"))
    np.testing.assert_allclose(seen[..., 0], values * (255 / top), atol=0.51)


@pytest.mark.parametrize("values", [[-5.0, 1.0], [0.0, 4000.0], [float("nan"), 1.0]])
def test_grey_values_of_unknown_range_are_refused(values: list[float]) -> None:
    """Measurements (CT units, heights) would be squeezed into grey by a guess."""
    data = encoded(Image.fromarray(np.array([values], dtype=np.float32)), "TIFF")
    with pytest.raises(ImageError, match=r"grey values .* do not fit"):
        open_image(data)


@pytest.mark.parametrize(
    "kind", ["RGBA", "LA", "P with alpha", "P with one clear colour", "RGB with a clear colour"]
)
def test_transparency_is_laid_over_white(kind: str) -> None:
    """Black shoes cut out on a clear ground would become black on black."""
    alpha = np.array([[0, 255, 128, 0]], dtype=np.uint8)
    colour = np.array([[[0, 0, 0], [0, 0, 0], [0, 0, 0], [9, 9, 9]]], dtype=np.uint8)
    if kind == "RGBA":
        data = encoded(Image.fromarray(np.dstack([colour, alpha])), "PNG")
    elif kind == "LA":
        data = encoded(Image.fromarray(np.dstack([colour[..., 0], alpha])), "PNG")
    elif kind == "P with alpha":
        image = Image.fromarray(np.array([[0, 1, 2, 3]], dtype=np.uint8)).convert("P")
        image.putpalette(colour.reshape(-1).tolist())
        data = encoded(image, "PNG", transparency=alpha.tobytes())
    elif kind == "P with one clear colour":
        image = Image.fromarray(np.array([[0, 1, 1, 0]], dtype=np.uint8)).convert("P")
        image.putpalette([0, 0, 0, 0, 0, 0])
        data, alpha = encoded(image, "GIF", transparency=0), np.array([[0, 255, 255, 0]], dtype=np.uint8)
    else:
        colour = np.array([[[7, 7, 7], [0, 0, 0], [0, 0, 0], [7, 7, 7]]], dtype=np.uint8)
        data, alpha = (
            encoded(Image.fromarray(colour), "PNG", transparency=(7, 7, 7)),
            np.array([[0, 255, 255, 0]]),
        )
    share = alpha[..., None] / 255
    np.testing.assert_allclose(pixels(data), colour * share + 255 * (1 - share), atol=1)


def test_palette_image_has_its_colours() -> None:
    """Diagrams saved as GIF or 8-bit PNG would be read as their palette numbers."""
    image = Image.fromarray(photo()).quantize(16)
    np.testing.assert_array_equal(pixels(encoded(image, "PNG")), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation(kind: str) -> None:
    """An animated sticker would be refused, or show another frame on every epoch."""
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    np.testing.assert_allclose(pixels(data)[4, 4].astype(int), [255, 0, 0], atol=3)


FORMATS = ["JPEG", "progressive JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"]


def noisy(kind: str) -> bytes:
    """A file of one kind in which every part of the data matters."""
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 60, 3)).astype(np.uint8))
    if kind == "progressive JPEG":
        return encoded(image, "JPEG", progressive=True)
    return encoded(image, kind)


@pytest.mark.parametrize("kind", FORMATS)
@quick
@given(share=st.floats(0, 0.97))
def test_truncated_files_are_refused(kind: str, share: float) -> None:
    """Half-copied files would be trained on with a grey lower half."""
    whole = noisy(kind)
    for cut in (int(len(whole) * share), len(whole) - int(share * 20) - 3):
        try:
            seen = pixels(whole[:cut])
        except ImageError:
            continue
        np.testing.assert_array_equal(seen, pixels(whole))


@pytest.mark.parametrize("kind", FORMATS)
def test_half_a_file_says_so(kind: str) -> None:
    """The reason shown for a half-copied file would not tell what to do."""
    whole = noisy(kind)
    with pytest.raises(ImageError, match=r"copy or download it again|not an image"):
        open_image(whole[: len(whole) // 2])


@pytest.mark.parametrize("kind", FORMATS)
@quick
@given(data=st.data())
def test_damaged_files_raise_only_image_errors(kind: str, data: st.DataObject) -> None:
    """One damaged file would end a run with a traceback from inside a decoder, or a warning."""
    damaged = bytearray(noisy(kind))
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, min(400, len(damaged)) - 1))
        damaged[at] = data.draw(st.integers(0, 255))
    try:
        message = open_image(bytes(damaged)).mode
    except ImageError as error:
        message = str(error)
    assert "\n" not in message


@pytest.mark.parametrize(("width", "height"), [(10_000, 9_000), (30_000, 30_000)])
def test_decompression_bomb_is_refused_from_its_header(tmp_path: Path, width: int, height: int) -> None:
    """A tiny file that unpacks to gigabytes would take the machine down."""
    path = tmp_path / "bomb.png"
    path.write_bytes(png(width, height, bits=8, colour=2, raw=None))
    with pytest.raises(ImageError) as caught:
        open_image(path)
    assert f"{width * height:,} pixels" in str(caught.value)
    assert f"{MAX_PIXELS:,}" in str(caught.value)
    with pytest.raises(ImageError, match="over the limit"):
        check_image(path, decode=False)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.jpg", b"", "the file is empty"),
        ("page.jpg", b"<html>404 Not Found</html>", "not an image that Pillow can read"),
        ("text.png", "con chó chạy".encode(), "not an image that Pillow can read"),
        ("gone.jpg", None, "not found"),
        ("head.png", b"\x89PNG\r\n\x1a\n", "copy or download it again|not an image"),
    ],
)
def test_what_is_not_an_image_is_named(tmp_path: Path, name: str, content: bytes | None, reason: str) -> None:
    """The user could not tell an empty download from a damaged photo or a typing error."""
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    for check in (open_image, check_image):
        with pytest.raises(ImageError, match=reason) as caught:
            check(path)
        assert caught.value.path == str(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert isinstance(caught.value, DataError)


def test_folder_in_place_of_an_image(tmp_path: Path) -> None:
    """Naming a folder would end in a traceback."""
    with pytest.raises(ImageError, match="directory"):
        open_image(tmp_path)


def test_image_error_crosses_processes() -> None:
    """An error in a loader's worker would hang or turn into another error on its way to the user."""
    error = pickle.loads(pickle.dumps(ImageError("a.jpg", "not found")))
    assert (error.path, error.reason, str(error)) == ("a.jpg", "not found", "a.jpg: not found")


def test_threads_share_the_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that opens images in threads would print warnings, or lose its own warnings for good."""
    both_inside, one_left = Barrier(2), Event()
    really = Image.open

    def in_step(file: io.BytesIO) -> Image.Image:
        if both_inside.wait(timeout=30) == 0:
            assert one_left.wait(timeout=30)
        return really(file)

    monkeypatch.setattr(Image, "open", in_step)
    before = list(warnings.filters)
    with ThreadPoolExecutor(2) as pool:
        opened = [pool.submit(open_image, damaged_exif((20, 30), ENDLESS_EXIF)) for _ in range(2)]
        wait(opened, return_when=FIRST_COMPLETED)
        one_left.set()
        assert [image.result().size for image in opened] == [(20, 30)] * 2
    assert list(warnings.filters) == before


def test_check_images_keeps_order_and_counts(tmp_path: Path) -> None:
    """The summary would blame the wrong file, or its progress bar never end."""
    whole = noisy("JPEG")
    contents = {"a.jpg": whole, "b.jpg": whole[:-200], "c.jpg": b"", "d.jpg": whole}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    paths = [tmp_path / name for name in [*contents, "e.jpg"]]
    seen: list[tuple[int, int]] = []
    reasons = dict(check_images(paths, workers=2, progress=lambda done, total: seen.append((done, total))))
    assert list(reasons) == paths
    assert [reason and reason.split(" (")[0] for reason in reasons.values()] == [
        None,
        "the file is cut short",
        "the file is empty",
        None,
        "not found",
    ]
    assert seen == [(done, 5) for done in range(1, 6)]
    headers = [reason is None for _, reason in check_images(paths, decode=False)]
    assert headers == [True, True, False, True, False]


def test_check_images_stops_when_told(tmp_path: Path) -> None:
    """A run that stops at its first bad image would go on to decode all the others."""
    seen: list[int] = []
    checks = check_images(
        [tmp_path / f"{i}.jpg" for i in range(1000)], progress=lambda done, _: seen.append(done)
    )
    next(checks)
    checks.close()
    assert seen == [1]
