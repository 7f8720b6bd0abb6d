"""From encoded files to square RGB pixels.

Who decodes: Pillow, except WebP files without alpha or metadata, which OpenCV decodes 2.3 times as fast on two
threads; both use libwebp, and the header alone decides. So the pixels do not depend on the machine.
Shrinking is OpenCV's: the same on all machines of one CPU architecture, elsewhere a pixel whose mean falls on
one half may be rounded the other way. Growing is Pillow's, in integers: the same everywhere (OpenCV's bicubic
differs between x86 and ARM). Embedded colour profiles are not applied.
"""

import io
import os
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from tmkd_ray.datasets.base import ImageDataset, SampleIndex, Split
from tmkd_ray.errors import UnreadableImageError, UserError
from tmkd_ray.progress import Rate

VERSION = 1
"""Raised whenever the same file gives other pixels; enters the knowledge store's fingerprint."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
"""What Pillow may open: no format that runs a program (EPS) or is not an image of pixels."""

MAX_PIXELS = 89_478_485
"""Larger images are refused before a pixel is decoded (the limit at which Pillow warns)."""

_CHUNK_ROWS = 1024
_SAY_EVERY_S = 10.0
_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class SetAside:
    """An image that could not be decoded, and why."""

    id: str
    reason: str


def list_set_aside(what: str, entries: Sequence[SetAside], most: int = 10) -> tuple[str, ...]:
    """Return lines that list unreadable images to the user; none where there are none."""
    if not entries:
        return ()
    lines = [f"{what}: {len(entries)} unreadable images were set aside:"]
    lines += [f"  {entry.id}: {entry.reason}" for entry in entries[:most]]
    return (*lines, f"  … and {len(entries) - most} more") if len(entries) > most else tuple(lines)


@dataclass
class LoadedImages:
    """Decoded images in memory.

    Attributes:
        images: uint8 [N, image_size, image_size, 3]. labels: int64 [N]. ids: unicode [N].
        set_aside: what was asked for and is not among them.
    """

    images: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    set_aside: list[SetAside] = field(default_factory=list)


def load_images(
    dataset: ImageDataset, split: Split, index: SampleIndex, num_threads: int | None = None
) -> LoadedImages:
    """Read and decode images in a thread pool; those that cannot be decoded are set aside.

    Args:
        num_threads: None takes one per core.

    Returns:
        The images in the index's order.

    Raises:
        UserError: not one image can be decoded.
    """
    num_threads = num_threads or os.cpu_count() or 1
    size = dataset.config.image_size
    images = np.empty((len(index), size, size, 3), dtype=np.uint8)
    reasons = np.full(len(index), None, dtype=object)

    def decode(positions: np.ndarray) -> int:
        images[positions], reasons[positions] = decode_batch(dataset, split, index.take(positions))
        return len(positions)

    # By place in the files, so that a block of a Parquet file is read by one chunk, or two.
    order = np.lexsort((index.row, index.part))
    chunk_rows = max(1, min(_CHUNK_ROWS, -(-len(index) // num_threads)))
    chunks = [order[start : start + chunk_rows] for start in range(0, len(index), chunk_rows)]
    progress = Rate(f"reading images, {split}", len(index), "images", _SAY_EVERY_S, quiet_if_short=True)
    with ThreadPoolExecutor(num_threads) as pool:
        for count in pool.map(decode, chunks):
            progress.advance(count)
    good = np.array([reason is None for reason in reasons], dtype=bool)
    set_aside = [SetAside(str(index.ids[i]), reasons[i]) for i in np.flatnonzero(~good)]
    if not set_aside:
        return LoadedImages(images, index.labels, index.ids)
    if len(set_aside) == len(index):
        raise UserError(
            f"dataset {dataset.config.name}, {split} split: none of the {len(index)} images can be decoded; "
            f"the first, {set_aside[0].id}: {set_aside[0].reason}"
        )
    return LoadedImages(images[good], index.labels[good], index.ids[good], set_aside)


def decode_batch(
    dataset: ImageDataset, split: Split, index: SampleIndex
) -> tuple[np.ndarray, list[str | None]]:
    """Read and decode images in this thread; one that cannot be decoded is black, its reason given.

    Returns:
        uint8 [N, image_size, image_size, 3] and N reasons, None where the image is good.
    """
    size = dataset.config.image_size
    images = np.zeros((len(index), size, size, 3), dtype=np.uint8)
    reasons: list[str | None] = [None] * len(index)
    for i, content in enumerate(dataset.read(split, index)):
        try:
            if isinstance(content, UnreadableImageError):
                raise content
            images[i] = resize_to_square(to_rgb(content), size)
        except UnreadableImageError as error:
            reasons[i] = str(error)
    return images, reasons


def to_rgb(data: bytes | np.ndarray) -> np.ndarray:
    """Decode an image file, or bring an array of pixels into the common form.

    The EXIF orientation is applied; of an animation or a multi-page file the first image is taken;
    transparency is laid over white; 16-bit values are divided by 256.

    Args:
        data: content of a JPEG, PNG, WebP, GIF, BMP, TIFF, PPM or JPEG 2000 file; or uint8 or uint16 of
            shape [H, W], or [H, W, channels] with 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGB, alpha).

    Returns:
        uint8 [H, W, 3].

    Raises:
        UnreadableImageError: it is empty, truncated, damaged, too large, or not an image; says which.
    """
    if isinstance(data, np.ndarray):
        return _array_to_rgb(data)
    if not data:
        raise UnreadableImageError("the file is empty")
    if _is_plain_webp(data):
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        if image is not None:
            decoded: np.ndarray = cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)
            return decoded
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            width, height = opened.size
            if width * height > MAX_PIXELS:
                raise UnreadableImageError(f"{width}×{height} pixels; at most {MAX_PIXELS:,} are decoded")
            opened.load()
            return _pillow_to_rgb(opened)
    except UnreadableImageError:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImageError(f"not an image ({', '.join(FORMATS)}), or its header is damaged") from error
    except Exception as error:
        # Damaged files make Pillow raise almost anything: OSError, SyntaxError, struct.error, KeyError …
        raise UnreadableImageError(f"{type(error).__name__}: {error}") from error


def resize_to_square(image: np.ndarray, size: int) -> np.ndarray:
    """Cut out the centred square and scale it; an image that already fits is returned as it is.

    Cutting first gives what scaling the shorter side and cropping then gives, without the long strip between.

    Args:
        image: uint8 [H, W, 3].

    Returns:
        uint8 [size, size, 3]: means over areas when shrinking, bicubic when growing.
    """
    height, width, _ = image.shape
    if height != width:
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        image = np.ascontiguousarray(image[top : top + side, left : left + side])
    if len(image) > size:
        shrunk: np.ndarray = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
        return shrunk
    if len(image) < size:
        return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))
    return image


def _is_plain_webp(data: bytes) -> bool:
    """Whether this is a WebP file of one opaque image, and of acceptable size (RFC 9649)."""
    if len(data) < 30 or data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return False
    if data[12:16] == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        width, height, alpha = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, bits >> 28 & 1
        return alpha == 0 and bool(width * height <= MAX_PIXELS)
    if data[12:16] == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return bool((width & 0x3FFF) * (height & 0x3FFF) <= MAX_PIXELS)
    return False


def _pillow_to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG")):
        pixels = _array_to_rgb(np.asarray(image).astype(np.uint16))
    elif image.mode in ("I", "F"):
        raise UnreadableImageError("its 32-bit values do not say what white is; save it with 8 or 16 bits")
    elif image.has_transparency_data:
        pixels = _array_to_rgb(np.asarray(image.convert("RGBA")))
    else:
        pixels = np.asarray(image.convert("RGB"))
    return _turn(pixels, _orientation(image))


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:
        # Damaged metadata, on which Pillow raises almost anything, says nothing against the pixels.
        return 1


def _turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo the camera's position (EXIF 2.3, tag 274, values 1 to 8)."""
    if not 2 <= orientation <= 8:
        return pixels
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _array_to_rgb(pixels: np.ndarray) -> np.ndarray:
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 2, 3, 4) or 0 in pixels.shape:
        raise UnreadableImageError(f"an array of shape {pixels.shape} is not an image")
    if pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise UnreadableImageError(f"an array of {pixels.dtype}; pixels are uint8 or uint16")
    channels = pixels.shape[2]
    if channels in (2, 4):
        alpha = pixels[:, :, -1:].astype(np.uint16)
        pixels = ((pixels[:, :, :-1] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    return np.repeat(pixels, 3, axis=2) if channels <= 2 else pixels
