"""How one image's knowledge is laid out in a Parquet row.

| column | type | meaning |
|---|---|---|
| `id` | string | the sample's id |
| `label` | int64 | index into the store's class names |
| `image` | fixed_size_binary | uint8 [H, W, 3], RGB, before augmentation |
| `augmentation` | fixed_size_binary | int16 [K, 5]: top, left, height, width, flip of each variant |
| `feature` | fixed_size_binary | [K, V, D]: the visual teacher's penultimate feature of each view |
| `clip_embedding` | fixed_size_binary | [K, V, E]: CLIP's image embedding of each view, unit length |

Without a text teacher there is no `clip_embedding`. Arrays are little-endian, C order. Shapes and types stand
in the schema metadata under `tmkd`, as JSON.
Binary columns rather than tensor types: an order of magnitude faster to write, and readable anywhere.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from tmkd_ray.augmentation import PARAMETERS
from tmkd_ray.errors import UserError

METADATA_KEY = b"tmkd"


@dataclass(frozen=True)
class KnowledgeLayout:
    """Shapes and types of a split's rows.

    Attributes:
        views: names of the V views. num_variants: K. feature_width: D.
        clip_width: E; None without a text teacher.
        dtype: of features and embeddings.
    """

    views: tuple[str, ...]
    num_variants: int
    image_size: int
    feature_width: int
    clip_width: int | None
    dtype: str = "float16"

    def arrays(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Return type and shape per image of each array column."""
        embedding = np.dtype(self.dtype).newbyteorder("<")
        per_view = (self.num_variants, len(self.views))
        columns: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
            "image": (np.dtype("u1"), (self.image_size, self.image_size, 3)),
            "augmentation": (np.dtype("<i2"), (self.num_variants, len(PARAMETERS))),
            "feature": (embedding, (*per_view, self.feature_width)),
        }
        if self.clip_width is not None:
            columns["clip_embedding"] = (embedding, (*per_view, self.clip_width))
        return columns

    def bytes_per_image(self) -> int:
        """Return the uncompressed bytes of one image's arrays."""
        return sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in self.arrays().values())

    def schema(self) -> pa.Schema:
        columns = [pa.field("id", pa.string()), pa.field("label", pa.int64())]
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
        return cls(**{**fields, "views": tuple(fields["views"])})


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
