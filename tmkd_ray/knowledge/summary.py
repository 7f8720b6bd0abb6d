"""What is in a store: what `tmkd knowledge show` says."""

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from tmkd_ray.errors import UserError
from tmkd_ray.fusion import Weighting
from tmkd_ray.knowledge.fingerprint import Fingerprint, flatten
from tmkd_ray.knowledge.layout import KnowledgeLayout
from tmkd_ray.knowledge.quality import TeacherQuality, measure_quality
from tmkd_ray.knowledge.store import SPLITS, KnowledgeStore, Manifest, ShardRecord

_NAMES_SHOWN = 10


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
