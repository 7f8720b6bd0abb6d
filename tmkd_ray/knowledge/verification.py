"""Is a store sound: what `tmkd knowledge verify` says."""

from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tmkd_ray import storage
from tmkd_ray.errors import UserError
from tmkd_ray.knowledge import lease
from tmkd_ray.knowledge.layout import KnowledgeLayout, decode_array, decode_images
from tmkd_ray.knowledge.quantization import dequantize
from tmkd_ray.knowledge.store import (
    SPLITS,
    KnowledgeStore,
    Manifest,
    ShardRecord,
    in_threads,
    record_files,
)

_UNIT_TOLERANCE = {"float32": 1e-5, "float16": 2.0**-11 + 1e-5, "int8": 1e-5}
"""Of an embedding's length: rounding of a float32 normalisation, and of the type; int8's adds half a step an
element."""

_NAMES_SHOWN = 10


def verify_store(store: KnowledgeStore, on_progress: Callable[[int, int], None] | None = None) -> list[str]:
    """Read everything in a finished store and return what is wrong; an empty list: it is sound.

    Each problem names the file, and the sample where there is one. One shard at a time is in memory.

    Args:
        on_progress: told the number of shards checked, and of all, after each.

    Raises:
        UserError: there is no finished store.
    """
    try:
        manifest = store.manifest()
    except UserError as error:
        if not store.is_finished():
            raise
        return [str(error)]
    problems = [*_check_files(store, manifest), *_check_constants(store, manifest)]
    seen: dict[str, dict[str, str]] = {split: {} for split in SPLITS}
    for number, record in enumerate(manifest.shards, 1):
        name = store.at(record.split, record.file)
        found = _check_shard(store, manifest, record, seen[record.split])
        problems += [problem if problem.startswith(name) else f"{name}: {problem}" for problem in found]
        if on_progress is not None:
            on_progress(number, len(manifest.shards))
    return problems


def _check_files(store: KnowledgeStore, manifest: Manifest) -> Iterator[str]:
    """Files that nothing names, and the small ones that disagree with the manifest."""
    named: dict[str, set[str]] = {split: set() for split in SPLITS}
    for record in manifest.shards:
        named[record.split].update(record_files(record))
    for split, names in named.items():
        for file in sorted(storage.sizes(store.at(split)).keys() - names):
            yield f"{store.at(split, file)}: no record of the manifest names this file"
    known = {"fingerprint.json", "head.safetensors", "manifest.json", lease.FILE}
    for file in sorted(storage.sizes(store.path).keys() - known):
        yield f"{store.at(file)}: not a file of a knowledge store"
    banks = {f"{key}.safetensors" for key in store.text_banks()}
    for file in sorted(storage.sizes(store.at("text_banks")).keys() - banks):
        yield f"{store.at('text_banks', file)}: not a text bank"

    try:
        if store.fingerprint() != manifest.fingerprint:
            yield f"{store.at('fingerprint.json')}: missing, or another than the manifest's"
    except UserError as error:
        yield str(error)

    def committed(record: ShardRecord) -> bool:
        try:
            return store.record(record.split, record_files(record)[1]) == record
        except UserError:
            return False

    for record, agrees in zip(manifest.shards, in_threads(committed, manifest.shards), strict=True):
        if not agrees:
            file = store.at(record.split, record_files(record)[1])
            yield f"{file}: missing, damaged, or another than in the manifest"


def _check_constants(store: KnowledgeStore, manifest: Manifest) -> Iterator[str]:
    """Classifier and text banks: readable, of the right shapes, finite."""
    layout, num_classes = manifest.layouts["train"], len(manifest.class_names)
    head = store.at("head.safetensors")
    try:
        constants = store.constants(None)
    except UserError as error:
        yield str(error)
    except KeyError as error:
        yield f"{head}: has no tensor {error}"
    else:
        shapes = [tuple(constants.head_weight.shape), tuple(constants.head_bias.shape)]
        expected = [(num_classes, layout.feature_width), (num_classes,)]
        if shapes != expected:
            yield f"{head}: weight and bias have the shapes {shapes}; expected {expected}"
        elif not all(values.isfinite().all() for values in (constants.head_weight, constants.head_bias)):
            yield f"{head}: has values that are not finite"
    for key in store.text_banks():
        file = store.at("text_banks", f"{key}.safetensors")
        try:
            bank, temperature = store.text_bank(key)
        except UserError as error:
            yield str(error)
            continue
        except KeyError as error:
            yield f"{file}: has no tensor {error}"
            continue
        wanted = (len(layout.views), num_classes, layout.clip_width)
        if tuple(bank.shape) != wanted:
            yield f"{file}: the bank is {tuple(bank.shape)}; expected {wanted}"
        elif not ((bank.norm(dim=-1) - 1).abs() <= 1e-4).all():  # false for NaN
            yield f"{file}: has text embeddings that are not of unit length"
        if not 0 < temperature < float("inf"):
            yield f"{file}: the temperature is {temperature}; expected a positive number"


def _check_shard(
    store: KnowledgeStore, manifest: Manifest, record: ShardRecord, seen: dict[str, str]
) -> Iterator[str]:
    """Everything about one shard; `seen` gathers the split's ids with the file they are in."""
    layout = manifest.layouts[record.split]
    try:
        content = store.shard_content(record)
    except UserError as error:
        yield str(error)
        return
    if len(content) != record.bytes:
        yield f"{len(content)} bytes; its record says {record.bytes}"
    try:
        table = pq.read_table(pa.BufferReader(content))
    except (pa.ArrowException, OSError) as error:
        yield f"cannot be read as Parquet: {error}"
        return
    if not table.schema.equals(layout.schema(), check_metadata=True):
        yield "its columns or metadata are not those of the manifest's layout"
        return
    if len(table) != record.rows:
        yield f"{len(table)} rows; its record says {record.rows}"

    ids: list[str] = table.column("id").to_pylist()
    for sample in ids:
        if sample in seen:
            yield f"the id {sample!r} is there twice, also in {seen[sample]}"
        seen[sample] = record.file

    def name(wrong_N: np.ndarray, what: str) -> Iterator[str]:
        rows = np.flatnonzero(wrong_N)
        if len(rows):
            listing = ", ".join(repr(ids[row]) for row in rows[:_NAMES_SHOWN])
            rest = f" … and {len(rows) - _NAMES_SHOWN} more" if len(rows) > _NAMES_SHOWN else ""
            yield f"{what}: {listing}{rest}"

    nulls = [column for column in table.schema.names if table.column(column).null_count]
    if nulls:
        yield f"null values in {', '.join(nulls)}"
        return
    labels = table.column("label").to_numpy()
    num_classes = len(manifest.class_names)
    yield from name((labels < 0) | (labels >= num_classes), f"labels outside 0 … {num_classes - 1}")
    columns = {
        column: decode_array(table.column(column), dtype, shape)
        for column, (dtype, shape) in layout.arrays().items()
    }
    if layout.has_encoded_images:
        yield from name(_undecodable(table.column("image"), layout.image_size), "images that cannot be decoded")
    yield from name(_outside(columns["augmentation"], layout), "crops that show nothing of the image")
    for column in ("feature", "clip_embedding"):
        if column in columns:
            scale = columns.get(f"{column}_scale")
            yield from _check_vectors(column, columns[column], scale, layout, name)


def _check_vectors(
    column: str,
    values: np.ndarray,
    scale: np.ndarray | None,
    layout: KnowledgeLayout,
    name: Callable[[np.ndarray, str], Iterator[str]],
) -> Iterator[str]:
    finite = _all_of_row(np.isfinite(values if scale is None else scale))
    if scale is not None:
        finite &= _all_of_row(scale >= 0)
        values = dequantize(values, scale)
    yield from name(~finite, f"{column} is not finite")
    if column == "clip_embedding":
        vectors = values.astype(np.float32)
        length = np.sqrt(np.einsum("...e,...e->...", vectors, vectors))
        tolerance = np.asarray(_UNIT_TOLERANCE[layout.dtype])
        if scale is not None:
            tolerance = tolerance + scale / 2 * np.sqrt(vectors.shape[-1])
        with np.errstate(invalid="ignore"):
            unit = _all_of_row(np.abs(length - 1) <= tolerance)
        yield from name(finite & ~unit, "clip_embedding is not of unit length")


def _all_of_row(good: np.ndarray) -> np.ndarray:
    rows: np.ndarray = np.logical_and.reduce(good.reshape(len(good), -1), axis=1)
    return rows


def _outside(parameters_NKP: np.ndarray, layout: KnowledgeLayout) -> np.ndarray:
    """Return bool [N]: a variant's crop is empty, larger than the image, or beside it."""
    size = layout.image_size
    names = layout.augmentation_parameters
    top, left, height, width = (
        parameters_NKP[..., names.index(name)].astype(np.int64) for name in ("top", "left", "height", "width")
    )
    good_NK = (top + height > 0) & (top < size) & (left + width > 0) & (left < size)
    good_NK &= (height > 0) & (height <= size) & (width > 0) & (width <= size)
    return ~_all_of_row(good_NK)


def _undecodable(column: pa.ChunkedArray, image_size: int) -> np.ndarray:
    bad_N = np.zeros(len(column), dtype=bool)
    try:
        decode_images(column, image_size)
    except UserError:
        for row in range(len(column)):
            try:
                decode_images(column.slice(row, 1), image_size, num_threads=1)
            except UserError:
                bad_N[row] = True
    return bad_N
