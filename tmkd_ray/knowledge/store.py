"""The knowledge store: a folder of Parquet shards and a manifest.

    fingerprint.json        what the content depends on; written first, so that nothing else is mixed in
    writer.json             who writes it, while someone does (`lease`)
    head.safetensors        the visual teacher's classifier: weight [C, D], bias [C]
    text_banks/HASH.safetensors   text bank [V, C, E] of one set of prompts, and CLIP's temperature
    train/00000-HASH.parquet …    shards (`layout` documents the columns), named by their content's SHA-256;
                            train/00000.json commits one
    validation/…            the validation split of train, without augmentation
    manifest.json           written last: layouts, class names, shards with rows and checksums, images set aside

A shard is written whole under the name of its content, then committed by its record; a reader of the
manifest never sees a part of one, and two writers whose bits differ cannot spoil each other's file. What is
committed is never computed again. `verification` checks all of it.
"""

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
from pydantic import StringConstraints, TypeAdapter, ValidationError

from tmkd_ray import storage
from tmkd_ray.errors import UserError
from tmkd_ray.fusion import TeacherConstants
from tmkd_ray.knowledge.fingerprint import Fingerprint, check_match
from tmkd_ray.knowledge.layout import KnowledgeLayout, decode_array, decode_images
from tmkd_ray.knowledge.quantization import dequantize
from tmkd_ray.progress import Rate
from tmkd_ray.types import Knowledge

SCHEMA_VERSION = 2

SPLITS = ("train", "validation")

_OURS = re.compile(r"\d{5,}((-[0-9a-f]{12})?\.parquet|\.json)")
"""Names that `write_shard` gives, or once gave."""

_REQUEST_THREADS = 32
"""Small files asked for at once: an object store answers each after some 20 ms."""

_SHARD_THREADS = 8
"""Shards read at once; each of them is in memory twice for a moment."""

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class ShardRecord:
    """What commits a shard.

    Attributes:
        file: name in the split's folder.
        bytes, sha256: of the file.
        set_aside: id and reason of unreadable images.
    """

    split: Annotated[str, StringConstraints(pattern=r"^(train|validation)$")]
    number: int
    file: Annotated[
        str, StringConstraints(pattern=r"^[0-9]{5,}-[0-9a-f]{12}\.parquet$")
    ]  # and no path out of it
    rows: int
    bytes: int
    sha256: str
    set_aside: list[dict[str, str]]


@dataclass(frozen=True)
class Manifest:
    """What a finished store holds."""

    class_names: tuple[str, ...]
    layouts: dict[str, KnowledgeLayout]
    shards: list[ShardRecord]
    fingerprint: Fingerprint

    @property
    def set_aside(self) -> list[dict[str, str]]:
        return [entry for shard in self.shards for entry in shard.set_aside]

    def rows(self, split: str) -> int:
        return sum(shard.rows for shard in self.shards if shard.split == split)

    def total_bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    def bytes_per_image_and_variant(self) -> float:
        """Return the mean over both splits; of no image, all of it."""
        pieces = sum(layout.num_variants * self.rows(split) for split, layout in self.layouts.items())
        return self.total_bytes() / max(pieces, 1)


@dataclass(frozen=True)
class KnowledgeArrays:
    """A split of a store in memory: N images, K variants, V views.

    Attributes:
        ids: [N]. labels: int64 [N].
        images: uint8 [N, H, W, 3]; None where the store only refers to them, or if not asked for.
        augmentation: int16 [N, K, P].
        feature: [N, K, V, D], as stored; None if not asked for.
        clip_embedding: [N, K, V, E], as stored; None also without a text teacher.
        feature_scale, clip_embedding_scale: float32 [N, K, V]; None unless the store is int8.
    """

    layout: KnowledgeLayout
    ids: np.ndarray
    labels: np.ndarray
    images: np.ndarray | None
    augmentation: np.ndarray
    feature: np.ndarray | None
    clip_embedding: np.ndarray | None
    feature_scale: np.ndarray | None = None
    clip_embedding_scale: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def knowledge(self, rows: np.ndarray | slice, variants: np.ndarray | None = None) -> Knowledge:
        """Return what the teachers say of some images, float32.

        Args:
            rows: int64 [B], or a slice.
            variants: int64 [B], which variant of each; None for the first.
        """
        assert self.feature is not None, "read with the teachers' columns"
        rows_B = np.arange(len(self))[rows]
        variants_B = np.zeros_like(rows_B) if variants is None else variants

        def tensor(values: np.ndarray, scale: np.ndarray | None) -> torch.Tensor:
            stored = values[rows_B, variants_B]
            if scale is None:
                return torch.from_numpy(stored.astype(np.float32))
            return torch.from_numpy(dequantize(stored, scale[rows_B, variants_B]))

        clip = None
        if self.clip_embedding is not None:
            clip = tensor(self.clip_embedding, self.clip_embedding_scale)
        return Knowledge(tensor(self.feature, self.feature_scale), clip)


def _in_memory(column: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    return np.empty(shape, dtype)


class KnowledgeStore:
    """A store at a path; opening one reads nothing."""

    def __init__(self, path: str) -> None:
        self.path = path

    def at(self, *parts: str) -> str:
        """Return the path of a file in the store."""
        return storage.join(self.path, *parts)

    def begin(self, fingerprint: Fingerprint) -> None:
        """Claim the folder for this fingerprint, or go on with what lies there.

        Raises:
            KnowledgeMismatchError: it holds another configuration's knowledge.
            UserError: it holds knowledge of which nothing says what it depends on.
        """
        if self.is_finished() or self.committed():
            self.check(fingerprint)
        else:
            storage.write_bytes(self.at("fingerprint.json"), _json(fingerprint))

    def check(self, fingerprint: Fingerprint, partly: bool = False) -> None:
        """Make sure that what lies there is of this fingerprint.

        Args:
            partly: the stored one may have more parts.

        Raises:
            KnowledgeMismatchError, UserError: as for `begin`.
        """
        stored = self.fingerprint()
        if stored is None:
            raise UserError(
                f"{self.at('fingerprint.json')} is missing: it cannot be told what the shards beside it were "
                "computed from; delete the folder and run `tmkd knowledge` again"
            )
        if partly:
            stored = {name: stored.get(name) for name in fingerprint}
        check_match(stored, fingerprint, self.path)

    def fingerprint(self) -> Fingerprint | None:
        """Return what the content depends on; None where there is no store yet.

        Raises:
            UserError: the file is damaged.
        """
        name = self.at("fingerprint.json")
        if not storage.exists(name):
            return None
        try:
            stored: Fingerprint = json.loads(storage.read_bytes(name))
        except ValueError as error:
            raise UserError(
                f"{name} is damaged ({error}): it cannot be told what {self.path} was computed from; "
                "delete the folder and run `tmkd knowledge` again"
            ) from error
        return stored

    def committed(self) -> dict[tuple[str, int], ShardRecord]:
        """Return the records of the shards that are done and there, by split and number.

        A damaged record, or one whose file is absent or of another size, counts for nothing: that shard is to
        be computed again.
        """
        records = {}
        for split in SPLITS:
            sizes = storage.sizes(self.at(split))
            names = [name for name in sizes if re.fullmatch(r"\d{5,}\.json", name)]
            for record in in_threads(partial(self.record, split), names):
                if record is not None and sizes.get(record.file) == record.bytes:
                    records[split, record.number] = record
        return records

    def record(self, split: str, name: str) -> ShardRecord | None:
        """Read the record of a shard from its file; None if it is damaged or not of this place."""
        try:
            record = _RECORD.validate_json(storage.read_bytes(self.at(split, name)))
        except ValidationError:
            return None
        expected = (split, name, _shard_name(record.number, record.sha256))
        return record if (record.split, _record_name(record.number), record.file) == expected else None

    def write_shard(
        self, split: str, number: int, table: pa.Table, set_aside: list[dict[str, str]]
    ) -> ShardRecord:
        """Write and commit one shard."""
        buffer = io.BytesIO()
        # Floating-point embeddings are noise to a compressor, and encoded images are compressed already.
        layout = KnowledgeLayout.from_schema(table.schema, f"shard {number} of {split}")
        noise = set() if layout.dtype == "int8" else {"feature", "clip_embedding"}
        if layout.has_encoded_images:
            noise.add("image")
        compression = {name: "none" if name in noise else "zstd" for name in table.schema.names}
        pq.write_table(table, buffer, compression=compression, use_dictionary=False, write_statistics=False)
        content = buffer.getvalue()
        sha256 = hashlib.sha256(content).hexdigest()
        file = _shard_name(number, sha256)
        record = ShardRecord(split, number, file, len(table), len(content), sha256, set_aside)
        storage.write_bytes(self.at(split, file), content)
        storage.write_bytes(self.at(split, _record_name(number)), _json(asdict(record)))
        return record

    def write_head(self, weight_CD: torch.Tensor, bias_C: torch.Tensor) -> None:
        """Keep the visual teacher's classifier."""
        tensors = {"weight": weight_CD.float().contiguous(), "bias": bias_C.float().contiguous()}
        storage.write_bytes(self.at("head.safetensors"), safetensors.torch.save(tensors))

    def has_head(self) -> bool:
        return storage.exists(self.at("head.safetensors"))

    def has_text_bank(self, key: str) -> bool:
        return storage.exists(self.at("text_banks", f"{key}.safetensors"))

    def text_banks(self) -> list[str]:
        """Return the keys of the text banks, the newest first."""
        folder = self.at("text_banks")
        names = [name for name in storage.sizes(folder) if re.fullmatch(r"[^.].*\.safetensors", name)]
        names.sort(key=lambda name: (storage.modified_s(storage.join(folder, name)) or 0.0, name), reverse=True)
        return [name.removesuffix(".safetensors") for name in names]

    def write_text_bank(self, key: str, bank_VCE: torch.Tensor, temperature: float) -> None:
        """Keep the text bank of one set of prompts, see `text_bank_key`."""
        tensors = {"bank": bank_VCE.float().contiguous(), "temperature": torch.tensor(temperature)}
        storage.write_bytes(self.at("text_banks", f"{key}.safetensors"), safetensors.torch.save(tensors))

    def finish(
        self, class_names: tuple[str, ...], layouts: dict[str, KnowledgeLayout], num_shards: dict[str, int]
    ) -> Manifest:
        """Write the manifest over the planned shards and delete what is none of them.

        What a killed or a second writer left goes first: the finished store is, byte for byte, that of an
        undisturbed run.

        Args:
            num_shards: that the plan wants, by split.

        Raises:
            UserError: some are missing; names them.
        """
        done = self.committed()
        planned = sorted((split, number) for split, count in num_shards.items() for number in range(count))
        missing = [f"{split}/{number:05d}" for split, number in planned if (split, number) not in done]
        if missing:
            listing = ", ".join(missing[:10]) + (f" … and {len(missing) - 10} more" if missing[10:] else "")
            raise UserError(
                f"the knowledge store at {self.path} lacks {len(missing)} of {len(planned)} shards: {listing}; "
                "run `tmkd knowledge` again"
            )
        records = [done[key] for key in planned]
        fingerprint = self.fingerprint()
        assert fingerprint is not None, "a store is begun before it is finished"
        self._delete_leftovers(records)
        manifest = Manifest(class_names, layouts, records, fingerprint)
        content = {"schema_version": SCHEMA_VERSION, **asdict(manifest)}
        storage.write_bytes(self.at("manifest.json"), _json(content))
        return manifest

    def _delete_leftovers(self, records: list[ShardRecord]) -> None:
        kept = {(record.split, name) for record in records for name in record_files(record)}
        storage.remove_leftovers(self.path)
        orphans = [
            self.at(split, name)
            for split in SPLITS
            for name in storage.sizes(self.at(split))
            if _OURS.fullmatch(name) and (split, name) not in kept
        ]
        # What a take-over that was killed left beside the writer's claim.
        orphans += [self.at(name) for name in storage.sizes(self.path) if name.startswith("writer.json.")]
        for _ in in_threads(storage.delete, orphans):
            pass

    def is_finished(self) -> bool:
        return storage.exists(self.at("manifest.json"))

    def manifest(self) -> Manifest:
        """Read the manifest.

        Raises:
            UserError: there is no finished store at this path, or one of another version, or it is damaged.
        """
        if not self.is_finished():
            raise UserError(f"no finished knowledge store at {self.path}; run `tmkd knowledge` first")
        name = self.at("manifest.json")
        try:
            content = json.loads(storage.read_bytes(name))
            version = content["schema_version"]
            if version == SCHEMA_VERSION:
                return _MANIFEST.validate_python(content)
        except (ValueError, KeyError, TypeError) as error:  # pydantic's ValidationError is a ValueError
            raise UserError(
                f"{name} is damaged ({str(error).splitlines()[0]}); delete it and run `tmkd knowledge` again, "
                "which computes nothing that is there"
            ) from error
        raise UserError(
            f"{self.path} is a knowledge store of schema version {version}, "
            f"this program reads {SCHEMA_VERSION}; compute it anew"
        )

    def read(
        self,
        split: str,
        *,
        with_images: bool = True,
        with_teacher: bool = True,
        allocate: Callable[[str, tuple[int, ...], np.dtype[Any]], np.ndarray] = _in_memory,
    ) -> KnowledgeArrays:
        """Read a split, in shard order.

        Args:
            with_images: False leaves the images out.
            with_teacher: False leaves out what the teachers say.
            allocate: makes the array of a column, given its name, shape and type.

        Raises:
            UserError: a shard is missing or is not what was committed (names the file).
        """
        manifest = self.manifest()
        layout = manifest.layouts[split]
        records = [record for record in manifest.shards if record.split == split]
        starts = np.cumsum([0, *(record.rows for record in records)]).tolist()
        total = starts.pop()
        arrays = {
            name: allocate(name, (total, *shape), dtype)
            for name, (dtype, shape) in layout.arrays().items()
            if name == "augmentation" or (with_images if name == "image" else with_teacher)
        }
        if with_images and layout.has_encoded_images:
            shape = (total, layout.image_size, layout.image_size, 3)
            arrays["image"] = allocate("image", shape, np.dtype(np.uint8))
        labels = np.empty(total, dtype=np.int64)

        def fill(record: ShardRecord, start: int) -> list[str]:
            content = self.shard_content(record)
            table = pq.read_table(pa.BufferReader(content), columns=["id", "label", *arrays], use_threads=False)
            assert len(table) == record.rows, (record, len(table))
            rows = slice(start, start + record.rows)
            labels[rows] = table.column("label").to_numpy()
            for name, values in arrays.items():
                column = table.column(name)
                if name == "image":
                    values[rows] = decode_images(column, layout.image_size, num_threads=1)
                else:
                    values[rows] = decode_array(column, values.dtype, values.shape[1:])
            ids: list[str] = table.column("id").to_pylist()
            return ids

        with ThreadPoolExecutor(_SHARD_THREADS) as pool:
            progress = Rate(f"reading the store, {split}", len(records), "shards", 10.0, quiet_if_short=True)
            ids = [name for part in progress.over(pool.map(fill, records, starts)) for name in part]
        return KnowledgeArrays(
            layout,
            ids=np.array(ids, dtype=np.str_),
            labels=labels,
            images=arrays.get("image"),
            augmentation=arrays["augmentation"],
            feature=arrays.get("feature"),
            clip_embedding=arrays.get("clip_embedding"),
            feature_scale=arrays.get("feature_scale"),
            clip_embedding_scale=arrays.get("clip_embedding_scale"),
        )

    def shard_content(self, record: ShardRecord) -> bytes:
        """Read a shard's file.

        Raises:
            UserError: it is missing, or is not what was committed.
        """
        name = self.at(record.split, record.file)
        if not storage.exists(name):
            raise UserError(f"{name} is missing from the knowledge store; run `tmkd knowledge` again")
        content = storage.read_bytes(name)
        if hashlib.sha256(content).hexdigest() != record.sha256:
            raise UserError(
                f"{name} is damaged: {len(content)} bytes that are not those committed ({record.bytes}); "
                "delete it and run `tmkd knowledge` again"
            )
        return content

    def constants(self, text_bank_key: str | None) -> TeacherConstants:
        """Read the classifier and, if asked for, a text bank.

        Raises:
            UserError: the text bank of these prompts is not there, or a file is damaged.
        """
        head = self._tensors("head.safetensors")
        views = self.manifest().layouts["train"].views
        if text_bank_key is None:
            return TeacherConstants(views, head["weight"], head["bias"])
        if not self.has_text_bank(text_bank_key):
            raise UserError(
                f"the knowledge store at {self.path} has no text bank for these prompts; run `tmkd knowledge`"
            )
        bank, temperature = self.text_bank(text_bank_key)
        return TeacherConstants(views, head["weight"], head["bias"], bank, temperature)

    def text_bank(self, key: str) -> tuple[torch.Tensor, float]:
        """Read a text bank [V, C, E] and CLIP's temperature.

        Raises:
            UserError: it is not there, or damaged.
        """
        tensors = self._tensors("text_banks", f"{key}.safetensors")
        return tensors["bank"], tensors["temperature"].item()

    def _tensors(self, *parts: str) -> dict[str, torch.Tensor]:
        name = self.at(*parts)
        try:
            return safetensors.torch.load(storage.read_bytes(name))
        except safetensors.SafetensorError as error:
            raise UserError(f"{name} is damaged ({error}); delete it and run `tmkd knowledge` again") from error


_RECORD = TypeAdapter(ShardRecord)
_MANIFEST = TypeAdapter(Manifest)


def text_bank_key(prompts: dict[str, tuple[str, ...]], class_names: tuple[str, ...], clip: str) -> str:
    """Name the text bank of these prompts per view, class names and CLIP text tower (its fingerprint)."""
    return hashlib.sha256(_json([prompts, class_names, clip])).hexdigest()[:16]


def record_files(record: ShardRecord) -> tuple[str, str]:
    """Return the names of a shard's two files in its split's folder."""
    return record.file, _record_name(record.number)


def in_threads(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Call a function that waits for storage on each item, many at once; results in order."""
    with ThreadPoolExecutor(_REQUEST_THREADS) as pool:
        yield from pool.map(function, items)


def _shard_name(number: int, sha256: str) -> str:
    return f"{number:05d}-{sha256[:12]}.parquet"


def _record_name(number: int) -> str:
    return f"{number:05d}.json"


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()
