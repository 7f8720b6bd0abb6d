"""Is a store sound, and what is in it: what `tmkd knowledge verify` and `tmkd knowledge show` say."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tmkd_ray import storage
from tmkd_ray.errors import UserError
from tmkd_ray.fusion import Weighting
from tmkd_ray.knowledge import lease
from tmkd_ray.knowledge.fingerprint import Fingerprint, flatten
from tmkd_ray.knowledge.layout import KnowledgeLayout, decode_array, decode_images
from tmkd_ray.knowledge.quality import TeacherQuality, measure_quality
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


@dataclass(frozen=True)
class SplitSummary:
    """What is committed of a split.

    Attributes:
        layout: None while nothing is.
    """

    rows: int
    num_shards: int
    num_bytes: int
    layout: KnowledgeLayout | None


@dataclass(frozen=True)
class StoreSummary:
    """What is in a store.

    Attributes:
        finished: whether there is a manifest; else the numbers are of the shards so far.
        class_names: None until it is finished.
        set_aside: id and reason of the images that could not be read.
        bytes_per_image_and_variant: on disk, mean over both splits; None while there is nothing.
        quality: on the validation split; None if that is empty, or not finished.
        text_bank: key of the text bank that was used; None without.
        weighting, fusion_temperature, clip_temperature: the quality's.
    """

    path: str
    finished: bool
    class_names: tuple[str, ...] | None
    splits: dict[str, SplitSummary]
    set_aside: list[dict[str, str]]
    bytes_per_image_and_variant: float | None
    fingerprint: Fingerprint
    quality: TeacherQuality | None
    text_bank: str | None
    weighting: Weighting
    fusion_temperature: float
    clip_temperature: float | None


def describe_store(
    store: KnowledgeStore,
    text_bank: str | None = None,
    *,
    weighting: Weighting = "label",
    fusion_temperature: float = 0.1,
    clip_temperature: float | None = None,
) -> StoreSummary:
    """Sum up a store, finished or not.

    Args:
        text_bank: key of the prompts' text bank; None for the newest.
        weighting, fusion_temperature: of the fusion to be measured.
        clip_temperature: None for CLIP's own.

    Raises:
        UserError: there is no store at this path, not this text bank, or a file is damaged.
    """
    fingerprint = store.fingerprint()
    if fingerprint is None:
        raise UserError(f"no knowledge store at {store.path}; run `tmkd knowledge` first")
    manifest = store.manifest() if store.is_finished() else None
    records = list(store.committed().values()) if manifest is None else manifest.shards
    splits = {split: _summarize(store, manifest, split, records) for split in SPLITS}
    pieces = sum(split.rows * split.layout.num_variants for split in splits.values() if split.layout)
    quality = None
    if manifest is not None and manifest.rows("validation"):
        text_bank = text_bank or next(iter(store.text_banks()), None)
        quality = measure_quality(
            store.read("validation", with_images=False),
            store.constants(text_bank),
            weighting,
            fusion_temperature,
            clip_temperature,
        )
        if text_bank is not None and clip_temperature is None:
            clip_temperature = store.text_bank(text_bank)[1]
    return StoreSummary(
        path=store.path,
        finished=manifest is not None,
        class_names=None if manifest is None else manifest.class_names,
        splits=splits,
        set_aside=[entry for record in records for entry in record.set_aside],
        bytes_per_image_and_variant=sum(record.bytes for record in records) / pieces if pieces else None,
        fingerprint=fingerprint,
        quality=quality,
        text_bank=text_bank,
        weighting=weighting,
        fusion_temperature=fusion_temperature,
        clip_temperature=clip_temperature,
    )


def _summarize(
    store: KnowledgeStore, manifest: Manifest | None, split: str, records: list[ShardRecord]
) -> SplitSummary:
    own = [record for record in records if record.split == split]
    layout = None
    if manifest is not None:
        layout = manifest.layouts[split]
    elif own:
        schema = pq.read_schema(pa.BufferReader(store.shard_content(own[0])))
        layout = KnowledgeLayout.from_schema(schema, store.at(split, own[0].file))
    return SplitSummary(
        rows=sum(record.rows for record in own),
        num_shards=len(own),
        num_bytes=sum(record.bytes for record in own),
        layout=layout,
    )


def format_summary(summary: StoreSummary) -> str:
    """Return a summary as plain text for a terminal."""
    num_shards = sum(split.num_shards for split in summary.splits.values())
    state = "finished" if summary.finished else f"not finished, {num_shards} shards so far"
    flat = {name: _plain(value) for name, value in flatten(summary.fingerprint).items()}
    lines = [f"knowledge store {summary.path}: {state}", ""]

    def line(name: str, value: object) -> None:
        lines.append(f"  {name:<20}{value}")

    line("dataset", flat.pop("dataset.name", "(not said)"))
    if summary.class_names is not None:
        names = ", ".join(summary.class_names[:5]) + (", …" if len(summary.class_names) > 5 else "")
        line("classes", f"{len(summary.class_names):,}: {names}")
    layout = next((split.layout for split in summary.splits.values() if split.layout), None)
    if layout is not None:
        line("views", ", ".join(layout.views))
        line("images", f"{layout.image_size}×{layout.image_size} pixels, {layout.image_format}")
        line("feature width", layout.feature_width)
        line("embedding width", "no text teacher" if layout.clip_width is None else layout.clip_width)
        line("numbers", layout.dtype)
    for name, split in summary.splits.items():
        variants = f", variants of each: {split.layout.num_variants}" if split.layout and split.rows else ""
        size = _size(split.num_bytes)
        line(name, f"{split.rows:,} images{variants}; {split.num_shards:,} shards, {size}")
    if summary.bytes_per_image_and_variant is not None:
        line("on disk", f"{_size(summary.bytes_per_image_and_variant)} an image and variant")
    line("set aside", f"{len(summary.set_aside):,} unreadable images")
    for entry in summary.set_aside[:_NAMES_SHOWN]:
        lines.append(f"    {entry['id']}: {entry['reason']}")
    if len(summary.set_aside) > _NAMES_SHOWN:
        lines.append(f"    … and {len(summary.set_aside) - _NAMES_SHOWN:,} more")

    model, weights = flat.pop("visual_teacher.model", None), flat.pop("visual_teacher.weights", None)
    line("visual teacher", f"{model or '(not said)'}, weights {weights or '(not said)'}")
    text = flat.pop("text_teacher.weights", None)
    flat.pop("text_teacher", None)
    line("text teacher", "none" if text is None else f"CLIP, weights {text}")

    if summary.quality is not None:
        lines += ["", *_quality_lines(summary, summary.quality)]
    lines += ["", "computed from"]
    lines += [f"  {name} = {value}" for name, value in sorted(flat.items())]
    return "\n".join(lines)


def _quality_lines(summary: StoreSummary, quality: TeacherQuality) -> Iterator[str]:
    def shown(values: dict[str, float]) -> str:
        return "   ".join(f"{name} {100 * value:.1f} %" for name, value in values.items())

    yield "teachers on the validation split, top-1"
    yield f"  {'each view':<20}{shown(quality.views)}"
    yield f"  {'fused':<20}{shown(quality.fused)}"
    if quality.zero_shot:
        yield f"  {'CLIP zero-shot':<20}{shown(quality.zero_shot)}"
        sees = ", which looks at the label" if summary.weighting in ("label", "margin") else ""
        yield (
            f"  semantic: weighting {summary.weighting}{sees}; fusion temperature "
            f"{summary.fusion_temperature:g}, CLIP's {summary.clip_temperature:.3g}; "
            f"text bank {summary.text_bank}"
        )
    yield "  oracle: any view is right"


def _plain(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    is_hash = len(text) == 64 and all(letter in "0123456789abcdef" for letter in text)
    return text[:12] + "…" if is_hash else text


def _size(num_bytes: float) -> str:
    for unit in ("B", "KB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"
