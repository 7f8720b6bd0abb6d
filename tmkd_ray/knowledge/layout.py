"""How one image's knowledge is laid out in a Parquet row.

| column | type | meaning |
|---|---|---|
| `id` | string | the sample's id |
| `label` | int64 | index into the store's class names |
| `image` | by `image_format` | the image before augmentation: uint8 [H, W, 3], RGB |
| `augmentation` | fixed_size_binary | int16 [K, P]: the P `augmentation_parameters` of each variant |
| `feature` | fixed_size_binary | [K, V, D]: the visual teacher's penultimate feature of each view |
| `feature_scale` | fixed_size_binary | float32 [K, V]: only with `dtype` int8; feature = int8 · scale |
| `clip_embedding` | fixed_size_binary | [K, V, E]: CLIP's image embedding of each view, unit length |
| `clip_embedding_scale` | fixed_size_binary | float32 [K, V]: only with `dtype` int8 |

Without a text teacher there is no `clip_embedding`. Arrays are little-endian, C order. Shapes and types stand
in the schema metadata under `tmkd`, as JSON: the fields of `KnowledgeLayout`.
Binary columns rather than tensor types: an order of magnitude faster to write, and readable anywhere.

| `image_format` | column `image` | bytes of raw at 32 / 224 pixels | written / read, images a second and core |
|---|---|---|---|
| `raw` | fixed_size_binary, the pixels | 1 (zstd in the file: 0.97 / 0.75–0.89) | as fast as the disk |
| `lossless` | binary, lossless WebP | 0.60 / 0.33–0.40 | 13,900 / 36,000 and 700 / 1,500 |
| `jpeg` | binary, JPEG of quality 95, 4:4:4 | 0.48 / 0.15–0.18 | 102,000 / 61,000 and 5,400 / 4,100 |
| `reference` | none: read again from the dataset by id | 0 | |

Measured on CIFAR-100 at 32 pixels and on photographs of streets and animals at 224. PNG by OpenCV at its
fastest is 0.74 and 0.49–0.55 of raw, written at 15,800 and 430 and read at 32,600 and 950 images a second:
larger, and slower where time counts; hence WebP.
"""

import io
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal

import cv2
import numpy as np
import pyarrow as pa
from PIL import Image

from tmkd_ray.augmentation import PARAMETERS
from tmkd_ray.errors import UserError

METADATA_KEY = b"tmkd"

ImageFormat = Literal["raw", "lossless", "jpeg", "reference"]

_DECODE_ROWS = 64
"""Images that a thread decodes at a time."""


@dataclass(frozen=True)
class KnowledgeLayout:
    """Shapes and types of a split's rows.

    Attributes:
        views: names of the V views. num_variants: K. feature_width: D.
        clip_width: E; None without a text teacher.
        dtype: of features and embeddings, `float16`, `float32` or `int8` (with a scale for each vector).
        image_format: how the images are kept, see the module.
        augmentation_parameters: names of the P numbers of an augmentation.
    """

    views: tuple[str, ...]
    num_variants: int
    image_size: int
    feature_width: int
    clip_width: int | None
    dtype: str = "float16"
    image_format: ImageFormat = "raw"
    augmentation_parameters: tuple[str, ...] = PARAMETERS

    def arrays(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Return type and shape per image of each column that holds an array: all but encoded images."""
        per_view = (self.num_variants, len(self.views))
        columns: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
        if self.image_format == "raw":
            columns["image"] = (np.dtype("u1"), (self.image_size, self.image_size, 3))
        columns["augmentation"] = (np.dtype("<i2"), (self.num_variants, len(self.augmentation_parameters)))
        for name, width in (("feature", self.feature_width), ("clip_embedding", self.clip_width)):
            if width is not None:
                columns[name] = (np.dtype(self.dtype).newbyteorder("<"), (*per_view, width))
                if self.dtype == "int8":
                    columns[f"{name}_scale"] = (np.dtype("<f4"), per_view)
        return columns

    @property
    def has_encoded_images(self) -> bool:
        """Whether images are stored as files of their own, each of its own length."""
        return self.image_format in ("lossless", "jpeg")

    def bytes_per_image(self) -> int:
        """Return the bytes of one image's row before the file's compression.

        An estimate where images are encoded (`has_encoded_images`): what photographs of this size took on
        average (measured from 32 to 320 pixels; single sets were up to a third off).
        """
        pixels = 3 * self.image_size**2
        image = 0.0
        if self.image_format == "lossless":
            image = pixels * 0.57 * (32 / self.image_size) ** 0.25
        elif self.image_format == "jpeg":
            image = 620 + pixels * 0.28 * (32 / self.image_size) ** 0.33  # 620: header and tables
        arrays = sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in self.arrays().values())
        return arrays + round(image)

    def schema(self) -> pa.Schema:
        columns = [pa.field("id", pa.string()), pa.field("label", pa.int64())]
        if self.has_encoded_images:
            columns.append(pa.field("image", pa.binary()))
        for name, (dtype, shape) in self.arrays().items():
            columns.append(pa.field(name, pa.binary(dtype.itemsize * int(np.prod(shape)))))
        return pa.schema(columns, metadata={METADATA_KEY: json.dumps(asdict(self)).encode()})

    @classmethod
    def from_schema(cls, schema: pa.Schema, source: str) -> "KnowledgeLayout":
        """Read the layout back from a file's schema.

        Raises:
            UserError: `source` is not a shard of a knowledge store.
        """
        metadata = (schema.metadata or {}).get(METADATA_KEY)
        if metadata is None:
            raise UserError(f"{source} is not a shard of a knowledge store: no `tmkd` metadata")
        fields = json.loads(metadata)
        names = {key: tuple(fields[key]) for key in ("views", "augmentation_parameters")}
        return cls(**{**fields, **names})


def encode_array(values: np.ndarray) -> pa.Array:
    """Turn [N, ...] into N fixed-size binary values, without copying what is already contiguous."""
    values = np.ascontiguousarray(values)
    width = values.itemsize * int(np.prod(values.shape[1:]))
    return pa.Array.from_buffers(pa.binary(width), len(values), [None, pa.py_buffer(values)])


def decode_array(
    column: pa.Array | pa.ChunkedArray, dtype: np.dtype[Any], shape: tuple[int, ...]
) -> np.ndarray:
    """Turn N fixed-size binary values into [N, *shape]; a view where the column is one chunk."""
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    width = dtype.itemsize * int(np.prod(shape))
    assert column.type.byte_width == width, (column.type, dtype, shape)
    flat = np.frombuffer(column.buffers()[1], dtype=dtype, offset=column.offset * width, count=-1)
    return flat[: len(column) * int(np.prod(shape))].reshape(len(column), *shape)


def encode_images(images_NHWC: np.ndarray, image_format: ImageFormat) -> pa.Array:
    """Turn uint8 [N, H, W, 3], RGB, into the values of a column `image`, in this thread.

    JPEG changes the pixels: what `decode_images` makes of the column is what everyone is to see.
    """
    assert image_format != "reference", "there is no such column"
    if image_format == "raw":
        return encode_array(images_NHWC)
    encode = _encode_webp if image_format == "lossless" else _encode_jpeg
    return pa.array([encode(image) for image in images_NHWC], pa.binary())


def decode_images(
    column: pa.Array | pa.ChunkedArray, image_size: int, num_threads: int | None = None
) -> np.ndarray:
    """Turn a column `image` of any format into uint8 [N, image_size, image_size, 3], RGB.

    Args:
        num_threads: None takes one per core.

    Raises:
        UserError: a value is not an image of this size; names its row.
    """
    if pa.types.is_fixed_size_binary(column.type):
        return decode_array(column, np.dtype("u1"), (image_size, image_size, 3))
    images = np.empty((len(column), image_size, image_size, 3), dtype=np.uint8)

    def decode(start: int) -> None:
        for row, value in enumerate(column.slice(start, _DECODE_ROWS), start):
            images[row] = _decode(np.frombuffer(value.as_buffer(), dtype=np.uint8), image_size, row)

    with ThreadPoolExecutor(num_threads or os.cpu_count() or 1) as pool:
        for _ in pool.map(decode, range(0, len(column), _DECODE_ROWS)):
            pass
    return images


def _encode_webp(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    # Method 0 writes 10 to 20 times as many images a second as libwebp's usual 4, for 4 to 15 % more bytes.
    Image.fromarray(image).save(buffer, "WEBP", lossless=True, quality=20, method=0)
    return buffer.getvalue()


def _encode_jpeg(image: np.ndarray) -> bytes:
    # Full colour resolution: 15 % more bytes, and at 32 pixels a third less error.
    sampling = cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444
    options = [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, sampling]
    written, content = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)
    assert written
    encoded: bytes = content.tobytes()
    return encoded


def _decode(content: np.ndarray, image_size: int, row: int) -> np.ndarray:
    image = cv2.imdecode(content, cv2.IMREAD_COLOR) if len(content) else None
    if image is None or image.shape != (image_size, image_size, 3):
        found = "damaged" if image is None else f"of {image.shape[1]}×{image.shape[0]} pixels"
        raise UserError(f"the image in row {row} is {found}; expected {image_size}×{image_size} pixels")
    decoded: np.ndarray = cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)
    return decoded
