"""Columns of a shard: arrays as fixed-size binary values."""

import itertools
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tmkd_ray.augmentation import PARAMETERS
from tmkd_ray.errors import UserError
from tmkd_ray.knowledge.layout import KnowledgeLayout, decode_array, encode_array

WITH_CLIP = KnowledgeLayout(("original", "edge"), 4, 16, 64, 24)
WITHOUT_CLIP = KnowledgeLayout(("original",), 1, 8, 10, None, dtype="float32")
INT8 = replace(WITH_CLIP, dtype="int8", image_format="jpeg")
REFERENCE = replace(WITHOUT_CLIP, dtype="int8", image_format="reference")
P = len(PARAMETERS)


@pytest.mark.parametrize("layout", [WITH_CLIP, WITHOUT_CLIP, INT8, REFERENCE])
def test_round_trip_through_a_file(layout: KnowledgeLayout) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(layout.schema().empty_table(), sink)
    schema = pq.read_schema(pa.BufferReader(sink.getvalue()))
    assert KnowledgeLayout.from_schema(schema, "a file") == layout
    assert schema.equals(layout.schema(), check_metadata=True)


def test_columns_as_documented() -> None:
    types = dict(zip(WITH_CLIP.schema().names, WITH_CLIP.schema().types, strict=True))
    assert types == {
        "id": pa.string(),
        "label": pa.int64(),
        "image": pa.binary(16 * 16 * 3),
        "augmentation": pa.binary(4 * P * 2),
        "feature": pa.binary(4 * 2 * 64 * 2),
        "clip_embedding": pa.binary(4 * 2 * 24 * 2),
    }
    assert WITH_CLIP.bytes_per_image() == 768 + 8 * P + 1024 + 384
    assert WITHOUT_CLIP.schema().names == ["id", "label", "image", "augmentation", "feature"]
    assert WITHOUT_CLIP.bytes_per_image() == 192 + 2 * P + 40
    assert {dtype.str for dtype, _ in WITH_CLIP.arrays().values()} == {"|u1", "<i2", "<f2"}


def test_columns_of_other_formats() -> None:
    assert dict(zip(INT8.schema().names, INT8.schema().types, strict=True)) == {
        "id": pa.string(),
        "label": pa.int64(),
        "image": pa.binary(),
        "augmentation": pa.binary(4 * P * 2),
        "feature": pa.binary(4 * 2 * 64),
        "feature_scale": pa.binary(4 * 2 * 4),
        "clip_embedding": pa.binary(4 * 2 * 24),
        "clip_embedding_scale": pa.binary(4 * 2 * 4),
    }
    assert REFERENCE.schema().names == ["id", "label", "augmentation", "feature", "feature_scale"]
    assert REFERENCE.bytes_per_image() == 2 * P + 10 + 4
    assert [layout.has_encoded_images for layout in (WITH_CLIP, INT8, REFERENCE)] == [False, True, False]
    assert {dtype.str for dtype, _ in INT8.arrays().values()} == {"<i2", "|i1", "<f4"}


def test_a_foreign_file_is_refused() -> None:
    with pytest.raises(UserError, match=r"somewhere/other\.parquet is not a shard"):
        KnowledgeLayout.from_schema(pa.schema([("id", pa.string())]), "somewhere/other.parquet")


@pytest.mark.parametrize("dtype", ["u1", "<i2", "<f2", "<f4"])
def test_encode_keeps_every_byte(dtype: str) -> None:
    values = np.random.default_rng(0).integers(0, 200, (5, 2, 3)).astype(dtype)
    column = encode_array(values)
    assert column.type == pa.binary(6 * values.itemsize)
    assert column.to_pylist() == [row.tobytes() for row in values]
    decoded = decode_array(column, values.dtype, (2, 3))
    assert decoded.dtype == values.dtype
    np.testing.assert_array_equal(decoded, values)


def test_contiguous_arrays_are_not_copied() -> None:
    values = np.arange(24, dtype=np.int16).reshape(4, 2, 3)
    column = encode_array(values)
    assert column.buffers()[1].address == values.ctypes.data
    assert np.shares_memory(decode_array(column, values.dtype, (2, 3)), values)


def test_encode_of_strided_arrays() -> None:
    values = np.arange(48, dtype=np.int16).reshape(4, 3, 4).transpose(0, 2, 1)[::2, 1:]
    np.testing.assert_array_equal(decode_array(encode_array(values), values.dtype, (3, 3)), values)


@pytest.mark.parametrize(("start", "length"), [(0, 2), (1, 3), (4, 1), (5, 0), (0, 0)])
def test_decode_of_slices(start: int, length: int) -> None:
    values = np.arange(30, dtype=np.float16).reshape(5, 2, 3)
    sliced = encode_array(values).slice(start, length)
    for column in (sliced, pa.chunked_array([sliced])):
        np.testing.assert_array_equal(
            decode_array(column, values.dtype, (2, 3)), values[start : start + length]
        )


@pytest.mark.parametrize("cuts", [[0, 5], [0, 2, 5], [0, 0, 1, 4, 5, 5], [1, 3, 4], [2, 2], [2, 2, 2]])
def test_decode_of_chunks(cuts: list[int]) -> None:
    """Chunks of unequal length, some empty, each a slice of a longer array."""
    values = np.arange(30, dtype=np.float32).reshape(5, 6)
    column = encode_array(values)
    chunks = [column.slice(a, b - a) for a, b in itertools.pairwise(cuts)]
    decoded = decode_array(pa.chunked_array(chunks), values.dtype, (6,))
    np.testing.assert_array_equal(decoded, values[cuts[0] : cuts[-1]])


def test_decode_of_nothing() -> None:
    empty = WITH_CLIP.schema().empty_table()
    for name, (dtype, shape) in WITH_CLIP.arrays().items():
        for column in (
            encode_array(np.empty((0, *shape), dtype)),
            empty.column(name),
            pa.chunked_array([], empty.schema.field(name).type),
        ):
            decoded = decode_array(column, dtype, shape)
            assert decoded.shape == (0, *shape)
            assert decoded.dtype == dtype


def test_decode_refuses_another_width() -> None:
    with pytest.raises(AssertionError):
        decode_array(encode_array(np.zeros((2, 3), np.float32)), np.dtype("<f2"), (3,))
