"""Every kind of image file, whole and broken."""

import contextlib
import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from dataset_samples import encode, random_pixels
from PIL import Image

from tmkd_ray.datasets import decode
from tmkd_ray.datasets.decode import resize_to_square, to_rgb
from tmkd_ray.errors import UnreadableImageError

PIXELS = random_pixels(0, 20, 30)
SMOOTH = np.asarray(Image.fromarray(random_pixels(1, 4, 6)).resize((96, 64), Image.Resampling.BICUBIC))

LOSSLESS = {
    "png": ("PNG", {}),
    "webp": ("WEBP", {"lossless": True}),
    "bmp": ("BMP", {}),
    "tiff": ("TIFF", {}),
    "tiff, deflated": ("TIFF", {"compression": "tiff_adobe_deflate"}),
    "ppm": ("PPM", {}),
    "jpeg 2000": ("JPEG2000", {"irreversible": False}),
}


def save(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def check_form(rgb: np.ndarray) -> None:
    assert rgb.dtype == np.uint8
    assert rgb.ndim == 3
    assert rgb.shape[2] == 3


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_formats_keep_every_pixel(name: str) -> None:
    form, options = LOSSLESS[name]
    rgb = to_rgb(encode(PIXELS, form, **options))
    check_form(rgb)
    np.testing.assert_array_equal(rgb, PIXELS)


@pytest.mark.parametrize(
    ("form", "options"),
    [("JPEG", {"quality": 95}), ("JPEG", {"progressive": True, "quality": 95}), ("WEBP", {"quality": 95})],
)
def test_lossy_formats_come_close(form: str, options: dict[str, object]) -> None:
    rgb = to_rgb(encode(SMOOTH, form, **options)).astype(int)
    assert np.abs(rgb - SMOOTH).mean() < 4


@pytest.mark.parametrize("pixels", [PIXELS, SMOOTH, PIXELS[:1, :1], PIXELS[:7, :13]])
@pytest.mark.parametrize("options", [{"lossless": True}, {"quality": 80}, {"quality": 20}])
def test_both_webp_decoders_agree(
    pixels: np.ndarray, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = encode(pixels, "WEBP", **options)
    assert decode._is_plain_webp(content)
    fast = to_rgb(content)
    monkeypatch.setattr(decode, "_is_plain_webp", lambda data: False)
    np.testing.assert_array_equal(fast, to_rgb(content))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_one_pixel(form: str) -> None:
    rgb = to_rgb(encode(np.full((1, 1, 3), 200, np.uint8), form))
    np.testing.assert_allclose(rgb, np.full((1, 1, 3), 200), atol=2)
    assert (resize_to_square(rgb, 8) == rgb).all()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "BMP", "TIFF", "GIF", "PPM"])
def test_greyscale(form: str) -> None:
    grey = SMOOTH[..., 0]
    rgb = to_rgb(save(Image.fromarray(grey), form))
    check_form(rgb)
    assert (rgb == rgb[..., :1]).all()
    np.testing.assert_allclose(rgb[..., 0], grey, atol=0 if form != "JPEG" else 25)


def test_black_and_white() -> None:
    bits = PIXELS[..., 0] > 127
    rgb = to_rgb(save(Image.fromarray(bits), "PNG"))
    np.testing.assert_array_equal(rgb, np.repeat(bits[..., None] * np.uint8(255), 3, axis=2))


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF"])
def test_transparency_is_laid_over_white(form: str) -> None:
    alpha = np.random.default_rng(2).integers(0, 256, (20, 30, 1), dtype=np.uint8)
    options = {"lossless": True, "exact": True} if form == "WEBP" else {}
    rgb = to_rgb(save(Image.fromarray(np.concatenate([PIXELS, alpha], axis=2)), form, **options))
    share = alpha.astype(np.float64) / 255
    np.testing.assert_array_equal(rgb, np.floor(PIXELS * share + 255 * (1 - share) + 0.5))


def test_grey_with_transparency() -> None:
    grey = np.array([[[10, 0], [10, 255], [100, 51]]], np.uint8)
    rgb = to_rgb(save(Image.fromarray(grey), "PNG"))
    assert rgb[0].tolist() == [[255] * 3, [10] * 3, [224] * 3]  # 100 × .2 + 255 × .8


def test_palette() -> None:
    image = Image.new("P", (3, 1))
    image.putdata([0, 1, 2])
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    for form in ("PNG", "GIF", "BMP", "TIFF"):
        assert to_rgb(save(image, form))[0].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]], form
    for form in ("PNG", "GIF"):
        rgb = to_rgb(save(image, form, transparency=1))
        assert rgb[0].tolist() == [[255, 0, 0], [255, 255, 255], [0, 0, 255]], form


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    wide = np.array([[0, 255, 256, 1000, 32768, 65535]], np.uint16)
    expected = [0, 0, 1, 3, 128, 255]
    contents = {form: save(Image.fromarray(wide), form) for form in ("PNG", "TIFF")}
    contents["PGM"] = b"P5 6 1 65535\n" + wide.astype(">u2").tobytes()
    for form, content in contents.items():
        rgb = to_rgb(content)
        check_form(rgb)
        assert rgb[0].tolist() == [[v] * 3 for v in expected], form
    colour = np.stack([wide, wide[:, ::-1], np.zeros_like(wide)], axis=2)
    for suffix in (".png", ".tiff"):
        _, content = cv2.imencode(suffix, colour[..., ::-1].copy())
        reds_and_greens = to_rgb(content.tobytes())[0, :, :2].tolist()
        assert reds_and_greens == [list(pair) for pair in zip(expected, expected[::-1], strict=True)], suffix


def test_values_without_a_white_are_refused() -> None:
    for values in (np.ones((4, 4), np.float32), np.full((4, 4), 70000, np.int32)):
        with pytest.raises(UnreadableImageError, match="32-bit"):
            to_rgb(save(Image.fromarray(values), "TIFF"))


@pytest.mark.parametrize(("form", "tolerance"), [("TIFF", 0), ("JPEG", 6)])
def test_cmyk(form: str, tolerance: int) -> None:
    inks = {"paper": (0, 0, 0, 0), "cyan": (255, 0, 0, 0), "yellow": (0, 0, 255, 0), "black": (0, 0, 0, 255)}
    expected = {"paper": (255, 255, 255), "cyan": (0, 255, 255), "yellow": (255, 255, 0), "black": (0, 0, 0)}
    for name, ink in inks.items():
        rgb = to_rgb(save(Image.new("CMYK", (16, 16), ink), form))
        check_form(rgb)
        np.testing.assert_allclose(
            rgb, np.broadcast_to(expected[name], (16, 16, 3)), atol=tolerance, err_msg=name
        )


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_image_of_several(form: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if form == "WEBP" else {}
    rgb = to_rgb(save(frames[0], form, save_all=True, append_images=frames[1:], **options))
    assert rgb.shape == (8, 8, 3)
    assert (rgb == (255, 0, 0)).all()


# By EXIF: which corner of the picture the first stored row and the first stored column belong to.
# The picture is [[1, 2, 3], [4, 5, 6]]; below is what a camera in each position stores.
STORED = {
    1: [[1, 2, 3], [4, 5, 6]],
    2: [[3, 2, 1], [6, 5, 4]],
    3: [[6, 5, 4], [3, 2, 1]],
    4: [[4, 5, 6], [1, 2, 3]],
    5: [[1, 4], [2, 5], [3, 6]],
    6: [[3, 6], [2, 5], [1, 4]],
    7: [[6, 3], [5, 2], [4, 1]],
    8: [[4, 1], [5, 2], [6, 3]],
}


@pytest.mark.parametrize("orientation", [*STORED, 0, 9, 77])
@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF", "JPEG"])
def test_exif_orientation(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.array(STORED.get(orientation, STORED[1]), np.uint8) * 40
    blocks = stored.repeat(16, axis=0).repeat(16, axis=1)  # one colour per JPEG block
    options = {"lossless": True} if form == "WEBP" else {}
    rgb = to_rgb(save(Image.fromarray(blocks).convert("RGB"), form, exif=exif.tobytes(), **options))
    assert rgb.shape == (32, 48, 3)
    np.testing.assert_allclose(rgb[8::16, 8::16, 0], np.array(STORED[1]) * 40, atol=2 if form == "JPEG" else 0)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_metadata_does_not_matter() -> None:
    for exif in (b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff", b"Exif\x00\x00garbage", b"Exif\x00\x00"):
        np.testing.assert_array_equal(to_rgb(encode(PIXELS, "PNG", exif=exif)), PIXELS)
        assert to_rgb(encode(SMOOTH, "JPEG", exif=exif)).shape == SMOOTH.shape


WHOLE = {
    "jpeg": encode(SMOOTH, "JPEG"),
    "progressive jpeg": encode(SMOOTH, "JPEG", progressive=True),
    "png": encode(PIXELS, "PNG"),
    "lossless webp": encode(PIXELS, "WEBP", lossless=True),
    "lossy webp": encode(SMOOTH, "WEBP"),
    "webp with alpha": save(Image.fromarray(np.dstack([PIXELS, PIXELS[..., :1]])), "WEBP", lossless=True),
    "gif": encode(PIXELS, "GIF"),
    "bmp": encode(PIXELS, "BMP"),
    "tiff": encode(PIXELS, "TIFF"),
    "deflated tiff": encode(PIXELS, "TIFF", compression="tiff_adobe_deflate"),
    "ppm": encode(PIXELS, "PPM"),
    "jpeg 2000": encode(PIXELS, "JPEG2000"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("share", [0.05, 0.3, 0.6])
@pytest.mark.parametrize("name", WHOLE)
def test_truncated(name: str, share: float) -> None:
    content = WHOLE[name]
    check_form(to_rgb(content))
    with pytest.raises(UnreadableImageError) as raised:
        to_rgb(content[: int(share * len(content))])
    assert str(raised.value)
    assert "0x" not in str(raised.value), "no addresses in a reason"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", WHOLE)
def test_damage_anywhere_gives_pixels_or_a_reason(name: str) -> None:
    rng = np.random.default_rng(3)
    for _ in range(60):
        content = np.frombuffer(WHOLE[name], np.uint8).copy()
        reach = len(content) if rng.random() < 0.5 else 64
        content[rng.integers(0, reach, 4)] = rng.integers(0, 256, 4)
        with contextlib.suppress(UnreadableImageError):
            check_form(to_rgb(content.tobytes()))


@pytest.mark.parametrize(
    "content",
    [
        b"\x00" * 100,
        b"%PDF-1.7 not a picture",
        b"das ist kein Bild",
        b"<html><body>404</body></html>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",
        b"\xff",
        b"RIFF\x00\x00\x00\x00WEBP",
        bytes(range(256)),
    ],
)
def test_what_is_not_an_image(content: bytes) -> None:
    with pytest.raises(UnreadableImageError, match=r"not an image \(JPEG, PNG"):
        to_rgb(content)


def test_empty() -> None:
    with pytest.raises(UnreadableImageError, match="empty"):
        to_rgb(b"")


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"\x00" * 100))
    )


BOMBS = {
    "png": png_header(100_000, 100_000),
    "png, twelve thousand squared": png_header(12_000, 12_000),
    "png, thin": png_header(1, 2**31 - 1),
    "gif": b"GIF89a"
    + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0)
    + b","
    + struct.pack("<HHHHB", 0, 0, 9, 9, 0)
    + b"\x02",
    "bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0),
    "lossless webp": b"RIFF"
    + struct.pack("<I", 50)
    + b"WEBPVP8L"
    + struct.pack("<IBI", 38, 0x2F, 0x0FFFFFFF)
    + b"\0" * 33,
    "ppm": b"P6 50000 50000 255\n",
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BOMBS)
def test_decompression_bombs(name: str) -> None:
    with pytest.raises(UnreadableImageError, match="pixels"):
        to_rgb(BOMBS[name])


def test_the_size_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    contents = [encode(PIXELS, "PNG"), encode(PIXELS, "WEBP", lossless=True), encode(PIXELS, "WEBP")]
    monkeypatch.setattr(decode, "MAX_PIXELS", 600)
    for content in contents:
        assert to_rgb(content).shape == (20, 30, 3)
    monkeypatch.setattr(decode, "MAX_PIXELS", 599)
    for content in contents:
        with pytest.raises(UnreadableImageError, match="30×20 pixels; at most 599"):
            to_rgb(content)


def test_arrays() -> None:
    grey = PIXELS[..., 0]
    assert to_rgb(PIXELS) is PIXELS
    for array in (grey, grey[..., None]):
        np.testing.assert_array_equal(to_rgb(array), np.stack([grey] * 3, axis=2))
    np.testing.assert_array_equal(to_rgb(PIXELS.astype(np.uint16) * 257), PIXELS)
    opaque, clear = np.full_like(PIXELS[..., :1], 255), np.zeros_like(PIXELS[..., :1])
    np.testing.assert_array_equal(to_rgb(np.dstack([PIXELS, opaque])), PIXELS)
    assert (to_rgb(np.dstack([PIXELS, clear])) == 255).all()
    for wrong in (np.zeros((0, 3, 3), np.uint8), np.zeros((2, 2, 5), np.uint8), np.zeros(4, np.uint8)):
        with pytest.raises(UnreadableImageError, match="shape"):
            to_rgb(wrong)
    with pytest.raises(UnreadableImageError, match="float64"):
        to_rgb(np.zeros((2, 2, 3)))


def area_means(image: np.ndarray, size: int) -> np.ndarray:
    """Mean over each output pixel's square, float64, by exact overlap of intervals."""
    side = len(image)
    edges = np.arange(size + 1) * side / size
    cells = np.arange(side)
    overlap = np.clip(np.minimum(edges[1:, None], cells + 1) - np.maximum(edges[:-1, None], cells), 0, None)
    overlap *= size / side
    return np.einsum("is,jt,stc->ijc", overlap, overlap, image.astype(np.float64))


@pytest.mark.parametrize(("side", "size"), [(64, 32), (96, 8), (50, 32), (33, 32), (37, 9)])
def test_shrinking_takes_means_over_areas(side: int, size: int) -> None:
    image = random_pixels(5, side, side)
    shrunk = resize_to_square(image, size)
    check_form(shrunk)
    assert np.abs(shrunk - area_means(image, size)).max() <= 0.5 + 1e-3


def cubic(image: np.ndarray, size: int) -> np.ndarray:
    """Cubic convolution with a = -1/2 (Keys 1981), float64, weights cut off at the border and renormalised."""
    side = len(image)
    x = np.abs((np.arange(size)[:, None] + 0.5) * side / size - 0.5 - np.arange(side))
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    weights /= weights.sum(1, keepdims=True)
    return np.clip(np.einsum("is,jt,stc->ijc", weights, weights, image.astype(np.float64)), 0, 255)


@pytest.mark.parametrize(("side", "size"), [(8, 32), (1, 16), (5, 16), (31, 32)])
def test_growing_is_bicubic(side: int, size: int) -> None:
    # Pillow rounds, and clips, after each of the two axes.
    image = (random_pixels(6, side, side) // 2 + 64).astype(np.uint8)
    grown = resize_to_square(image, size)
    check_form(grown)
    assert np.abs(grown - cubic(image, size)).max() <= 1.5


def test_centre_is_cut_out() -> None:
    image = random_pixels(7, 40, 61)
    assert resize_to_square(PIXELS[:, :20], 20).base is PIXELS  # fits: as it is
    np.testing.assert_array_equal(resize_to_square(image, 40), image[:, 10:50])
    np.testing.assert_array_equal(
        resize_to_square(image.transpose(1, 0, 2), 40), image.transpose(1, 0, 2)[10:50]
    )
    assert np.abs(resize_to_square(image, 10) - area_means(image[:, 10:50], 10)).max() <= 0.5 + 1e-3


def test_a_thread_like_image_needs_no_long_strip() -> None:
    thread = np.full((1, 60_000, 3), 77, np.uint8)
    assert (resize_to_square(thread, 224) == 77).all()
