"""The image column: every format comes back in the same shape, lossless ones to the byte."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tmkd_ray.datasets.decode import to_rgb
from tmkd_ray.errors import UserError
from tmkd_ray.knowledge.layout import ImageFormat, KnowledgeLayout, decode_images, encode_images

FORMATS: tuple[ImageFormat, ...] = ("raw", "lossless", "jpeg")
MAGIC = {"lossless": (b"RIFF", "WEBP"), "jpeg": (b"\xff\xd8\xff", "JPEG")}


def gradients(count: int, size: int) -> np.ndarray:
    """Smooth images with unlike channels: an exchange of red and blue would show."""
    rng = np.random.default_rng(0)
    along = np.linspace(0, 1, size)
    corners = rng.uniform(0, 255, (4, count, 1, 1, 3))
    x, y = along[None, None, :, None], along[None, :, None, None]
    values = (corners[0] * (1 - x) + corners[1] * x) * (1 - y) + (corners[2] * (1 - x) + corners[3] * x) * y
    images: np.ndarray = values.astype(np.uint8)
    return images


@pytest.mark.parametrize("image_format", ["raw", "lossless"])
@pytest.mark.parametrize("size", [1, 8, 33])
def test_every_byte_comes_back(image_format: ImageFormat, size: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (70, size, size, 3), dtype=np.uint8)
    for images in (noise, noise[::-3], np.zeros_like(noise), np.full_like(noise, 255), gradients(3, size)):
        np.testing.assert_array_equal(decode_images(encode_images(images, image_format), size), images)


def test_jpeg_is_close() -> None:
    images = gradients(20, 32)
    decoded = decode_images(encode_images(images, "jpeg"), 32)
    error = np.abs(decoded.astype(int) - images)
    assert error.mean() < 1.5
    assert error.max() > 0
    again = decode_images(encode_images(decoded, "jpeg"), 32)
    assert np.abs(again.astype(int) - decoded).mean() < 0.5


@pytest.mark.parametrize("image_format", ["lossless", "jpeg"])
def test_files_as_other_programs_know_them(image_format: ImageFormat) -> None:
    images = gradients(3, 16)
    column = encode_images(images, image_format)
    assert column.type == pa.binary()
    magic, name = MAGIC[image_format]
    for content, image, decoded in zip(column.to_pylist(), images, decode_images(column, 16), strict=True):
        assert content.startswith(magic)
        with Image.open(io.BytesIO(content)) as opened:
            assert (opened.format, opened.mode, opened.size) == (name, "RGB", (16, 16))
            pixels = np.asarray(opened)
        assert np.abs(pixels.astype(int) - image).max() < 12
        assert np.abs(pixels.astype(int) - decoded).max() < 12
        if image_format == "lossless":
            np.testing.assert_array_equal(pixels, image)


@pytest.mark.parametrize("image_format", FORMATS)
def test_decoding_is_the_same_however_it_is_shared_out(image_format: ImageFormat) -> None:
    images = gradients(150, 8)
    column = encode_images(images, image_format)
    one = decode_images(column, 8, num_threads=1)
    assert one.dtype == np.uint8
    np.testing.assert_array_equal(decode_images(column, 8, num_threads=5), one)
    chunked = pa.chunked_array(
        [column.slice(0, 3), column.slice(3, 0), column.slice(3, 100), column.slice(103)]
    )
    np.testing.assert_array_equal(decode_images(chunked, 8), one)
    np.testing.assert_array_equal(decode_images(column.slice(70, 5), 8), one[70:75])
    assert decode_images(column.slice(0, 0), 8).shape == (0, 8, 8, 3)
    assert decode_images(pa.chunked_array([], column.type), 8).shape == (0, 8, 8, 3)


@pytest.mark.parametrize("bad", [b"", b"not an image", b"RIFF\x10\x00\x00\x00WEBPVP8L\x00\x00"])
def test_what_is_no_image_is_named(bad: bytes) -> None:
    column = pa.array([*encode_images(gradients(2, 8), "lossless").to_pylist(), bad], pa.binary())
    with pytest.raises(UserError, match="the image in row 2 is damaged"):
        decode_images(column, 8)


def test_an_image_of_another_size_is_named() -> None:
    with pytest.raises(UserError, match=r"row 0 is of 16×16 pixels; expected 8×8"):
        decode_images(encode_images(gradients(1, 16), "jpeg"), 8)


@pytest.mark.parametrize("size", [32, 64, 224])
@pytest.mark.parametrize("image_format", ["lossless", "jpeg"])
def test_the_estimate_is_of_the_right_order(image_format: ImageFormat, size: int) -> None:
    """Natural images lie between smooth gradients and noise."""
    layout = KnowledgeLayout(("original",), 1, size, 8, None, image_format=image_format)
    estimate = layout.bytes_per_image() - replace(layout, image_format="reference").bytes_per_image()
    noise = np.random.default_rng(0).integers(0, 256, (3, size, size, 3), dtype=np.uint8)
    for images, is_below in ((gradients(3, size), True), (noise, False)):
        mean = np.mean([len(content) for content in encode_images(images, image_format).to_pylist()])
        assert (mean < estimate) == is_below


@pytest.fixture(scope="module")
def cifar_images() -> np.ndarray:
    files = sorted((Path(__file__).parents[3] / "shared" / "data" / "cifar100").glob("train-*.parquet"))
    if not files:
        pytest.skip("CIFAR-100 is not there")
    rows = next(pq.ParquetFile(files[0]).iter_batches(500, columns=["image"]))
    return np.stack([to_rgb(image["bytes"]) for image in rows.column("image").to_pylist()])


@pytest.mark.data
@pytest.mark.parametrize(("image_format", "expected"), [("lossless", 1841), ("jpeg", 1488)])
def test_the_estimate_on_cifar(image_format: ImageFormat, expected: int, cifar_images: np.ndarray) -> None:
    """Within a tenth of what the module says was measured, and of the estimate."""
    layout = KnowledgeLayout(("original",), 1, 32, 8, None, image_format=image_format)
    estimate = layout.bytes_per_image() - replace(layout, image_format="reference").bytes_per_image()
    mean = np.mean([len(content) for content in encode_images(cifar_images, image_format).to_pylist()])
    assert mean == pytest.approx(expected, rel=0.1)
    assert estimate == pytest.approx(expected, rel=0.1)
